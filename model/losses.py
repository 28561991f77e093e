"""The losses, as pure functions of tensors.

K masks · (H, W) the original frame · G the side of SAM's embedding. Logits and targets are float,
targets 0 or 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _valid(target: Tensor, ignore: Tensor | None) -> Tensor:
    """float (K, H, W): 1 where a pixel counts."""
    if ignore is None:
        return torch.ones_like(target)
    return (~ignore).to(target.dtype).expand_as(target)


def bce_per_mask(
    logits: Tensor, target: Tensor, ignore: Tensor | None = None, balance: bool = False
) -> Tensor:
    """Binary cross-entropy of each mask: logits and target (K, H, W), ignore bool (H, W) or (K, H,
    W) -> (K,).

    The paper's form is the mean over the pixels that are not ignored. ``balance`` gives half of the
    weight to the target's pixels and half to the rest, because with targets of one percent of the
    image the plain mean is content with an empty mask. An empty or full target has only one half,
    which then has all the weight. A mask without pixels that count gives 0.
    """
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    valid = _valid(target, ignore)
    if not balance:
        return (loss * valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
    inside, outside = valid * target, valid * (1 - target)
    sizes = [part.sum((1, 2)) for part in (inside, outside)]
    means = [(loss * inside).sum((1, 2)), (loss * outside).sum((1, 2))]
    both = means[0] / sizes[0].clamp(min=1) + means[1] / sizes[1].clamp(min=1)
    halves = (sizes[0] > 0).to(target.dtype) + (sizes[1] > 0).to(target.dtype)
    return both / halves.clamp(min=1)


def dice_per_mask(
    logits: Tensor,
    target: Tensor,
    ignore: Tensor | None = None,
    scale: float = 1000.0,
    eps: float = 1e-6,
) -> Tensor:
    """1 − (2Σ(p/s·y) + ε) / (Σp/s + Σy/s + ε) of each mask: logits and target (K, H, W), ignore
    bool (H, W) or (K, H, W) -> (K,).

    Sums are divided by ``scale`` s first, as in the published code: that keeps half-precision sums
    finite and gives ε the weight that it has there.
    """
    valid = _valid(target, ignore)
    p, y = logits.sigmoid() * valid, target * valid
    overlap = 2 * (p / scale * y).sum((1, 2))
    total = (p / scale).sum((1, 2)) + (y / scale).sum((1, 2))
    return 1 - (overlap + eps) / (total + eps)


def pointing_per_token(tokens: Tensor, position: Tensor, area: Tensor) -> Tensor:
    """How badly a token points at its target: (K, C), (G*G, C), area (K, G*G) -> (K,).

    The token, dotted with SAM's own positional encoding of every cell and divided by √C as in
    attention, gives logits over the cells; the loss is the cross-entropy against ``area``, the
    share of the target in every cell. SAM's decoder compares tokens with that encoding, so a token
    that points breaks the plateau of empty masks that small models start from. The paper does not
    have this loss. A target without area contributes 0.
    """
    log_p = F.log_softmax(tokens @ position.T / tokens.shape[-1] ** 0.5, dim=-1)
    share = area / area.sum(1, keepdim=True).clamp(min=torch.finfo(area.dtype).tiny)
    return -(share * log_p).sum(1)


def text_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the supervised tokens of the batch, float32: logits (n, V), labels
    int64 (n,) -> ()."""
    if labels.numel() == 0:
        # Every rank must run the same backward pass, so the graph is kept.
        return logits.float().sum() * 0.0
    return F.cross_entropy(logits.float(), labels)

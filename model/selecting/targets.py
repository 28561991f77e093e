"""What a selector learns from: the overlap of every proposal with every target, and the losses on
it, as pure functions.

n targets · T targets of one conversation · K proposals of an image."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.collate import Batch
from dataset.proposals import overlaps


def similarity_loss(similarity: Tensor, iou: Tensor, present: Tensor, temperature: float) -> Tensor:
    """KL(softmax(IoU/τ) ‖ softmax(cos/τ)) of each target over its proposals: three (n, K) -> (n,).

    0 for a target whose image has no proposals.
    """
    absent = ~present
    # a softmax over nothing would be NaN, and so would its gradient
    absent = absent & present.any(1, keepdim=True)
    truth = (iou / temperature).masked_fill(absent, -torch.inf).log_softmax(1)
    found = (similarity / temperature).masked_fill(absent, -torch.inf).log_softmax(1)
    difference = (truth - found).masked_fill(~present, 0.0)
    return (truth.exp() * difference).sum(1)


def iop_loss(predicted: Tensor, iop: Tensor, present: Tensor) -> Tensor:
    """Squared error weighted by exp(IoP − 1), so that what lies inside counts most; mean over the
    proposals of each target, 0 where there are none: three (n, K) -> (n,)."""
    error = ((iop - 1).exp() * (predicted - iop) ** 2).masked_fill(~present, 0.0)
    return error.sum(1) / present.sum(1).clamp(min=1)


def truth_of(batch: Batch, use_ignore: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """IoU and IoP of every proposal with every target, (T, K) each, for every conversation of the
    batch."""
    out = []
    for row, targets in enumerate(batch.target_masks):
        proposals = batch.proposals[int(batch.image_index[row])]
        ignore = batch.ignore_masks[row] if use_ignore else None
        hidden = None if ignore is None else to_frame(ignore[None], proposals.size)[0]
        out.append(overlaps(proposals.masks, to_frame(targets, proposals.size), hidden))
    return out


def overlap(masks: Tensor, targets: Tensor, ignore: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """IoU and IoP of each mask with its own target, as ``dataset.proposals.overlaps``: bool (n, H,
    W) twice, and bool (H, W) of pixels that count nowhere -> float32 (n,) twice. One after the
    other: masks are large."""
    out = torch.zeros((2, len(masks)), device=masks.device)
    for row, (mask, target) in enumerate(zip(masks, targets, strict=True)):
        if ignore is not None:
            mask, target = mask & ~ignore, target & ~ignore
        inter = (mask & target).sum()
        out[0, row], out[1, row] = (
            inter / (mask | target).sum().clamp(min=1),
            inter / mask.sum().clamp(min=1),
        )
    return out[0], out[1]


def to_frame(masks: Tensor, size: tuple[int, int]) -> np.ndarray:
    """bool (T, H, W) -> bool (T, h, w); a pixel of the new frame is set where more than half of it
    was."""
    if tuple(masks.shape[1:]) != tuple(size) and len(masks):
        masks = F.interpolate(masks[None].float(), size, mode="area")[0] > 0.5
    return masks.cpu().numpy()

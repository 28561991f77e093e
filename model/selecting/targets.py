"""What a selector learns from: the overlap of every proposal with every target, and the losses on
it, as pure functions.

n targets of the batch · T targets of one conversation · K proposals of an image.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cores.dataset.collate import Batch
from cores.dataset.proposals import overlaps


def similarity_loss(similarity: Tensor, iou: Tensor, present: Tensor, temperature: float) -> Tensor:
    """KL(softmax(IoU/τ) ‖ softmax(cos/τ)) of each target over its proposals: three (n, K) -> (n,).

    0 for a target whose image has no proposals.
    """
    # A softmax over nothing would be NaN, and so would its gradient, so a row without proposals
    # keeps all its columns here and is set to 0 below.
    absent = ~present & present.any(1, keepdim=True)
    ground_truth = (iou / temperature).masked_fill(absent, -torch.inf).log_softmax(1)
    found = (similarity / temperature).masked_fill(absent, -torch.inf).log_softmax(1)
    difference = (ground_truth - found).masked_fill(~present, 0.0)
    return (ground_truth.exp() * difference).sum(1)


def iop_loss(predicted: Tensor, iop: Tensor, present: Tensor) -> Tensor:
    """Squared error weighted by exp(IoP − 1), so that what lies inside counts most: three (n, K) ->
    (n,), the mean over the proposals of each target, 0 where there are none."""
    error = ((iop - 1).exp() * (predicted - iop) ** 2).masked_fill(~present, 0.0)
    return error.sum(1) / present.sum(1).clamp(min=1)


def proposal_targets(
    batch: Batch, width: int, use_ignore: bool, chain_masks: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """IoU and IoP of every proposal with every target of the batch, float32 (n, width) each, 0
    where an image has fewer proposals.

    ``use_ignore``: leave ignored pixels out. ``chain_masks``: N × bool (T, H, W), the chain's mask
    of each target, whose overlap is the last column.
    """
    device, rows = batch.input_ids.device, []
    assert batch.proposals is not None, "a batch for a selector has proposals"
    for n, targets in enumerate(batch.target_masks):
        proposals = batch.proposals[int(batch.image_index[n])]
        ignore = batch.ignore_masks[n] if use_ignore else None
        hidden = None if ignore is None else to_frame(ignore[None], proposals.size)[0]
        found = overlaps(proposals.masks, to_frame(targets, proposals.size), hidden)
        table = torch.zeros((2, len(targets), width), device=device)
        table[..., : len(proposals)] = torch.from_numpy(np.stack(found))
        if chain_masks is not None:
            table[..., -1] = torch.stack(overlap(chain_masks[n], targets, ignore))
        rows.append(table)
    iou, iop = torch.cat(rows, dim=1)
    return iou, iop


def overlap(masks: Tensor, targets: Tensor, ignore: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """IoU and IoP, float32 (n,) each, of each mask with its own target: bool (n, H, W) twice, and
    bool (H, W) of pixels that count nowhere. Masks are large, so they are compared one by one."""
    iou, iop = torch.zeros((2, len(masks)), device=masks.device)
    for row, (mask, target) in enumerate(zip(masks, targets, strict=True)):
        if ignore is not None:
            mask, target = mask & ~ignore, target & ~ignore
        inter = (mask & target).sum()
        iou[row] = inter / (mask | target).sum().clamp(min=1)
        iop[row] = inter / mask.sum().clamp(min=1)
    return iou, iop


def to_frame(masks: Tensor, size: tuple[int, int]) -> np.ndarray:
    """bool (T, H, W) -> bool (T, h, w): a pixel of the new frame is set where more than half of it
    was set in the old one."""
    if tuple(masks.shape[1:]) != tuple(size) and len(masks):
        masks = F.interpolate(masks[None].float(), size, mode="area")[0] > 0.5
    return masks.cpu().numpy()

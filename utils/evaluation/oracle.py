"""The ceiling of a method that selects: what the best choice among the proposals would score.

K proposals of an image · H, W the original frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle

from cores.dataset.proposals import Proposals, ProposalSource
from cores.utils.evaluation.baselines import Guess
from cores.utils.metrics import mask_iou, overlap_summary


def oracle_masks(
    proposals: np.ndarray, target: np.ndarray, ignore: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The best choices of one who knows the target: proposals bool (K, H, W), target and ignore
    bool (H, W) -> bool (H, W) each.

    ====================  =========================================================================
    oracle_best_proposal  the one proposal with the highest IoU
    oracle_iop            the union of all proposals of which more than half lies inside the target,
                          the rule of the published code
    oracle_union          the better of both, grown by the proposal that raises the IoU most until
                          none does; being greedy, it may miss a slightly better union
    ====================  =========================================================================
    """
    nothing = np.zeros_like(target)
    counted = np.ones_like(target) if ignore is None else ~ignore

    def score(mask: np.ndarray) -> float:
        return mask_iou(mask, target, ignore)

    best = max(proposals, key=score, default=nothing)
    inside = [(p & target & counted).sum() > 0.5 * (p & counted).sum() for p in proposals]
    iop = np.any(proposals[np.array(inside)], axis=0) if any(inside) else nothing
    union = max((best, iop), key=score)
    while len(proposals):
        grown = max((union | p for p in proposals), key=score)
        if score(grown) <= score(union):
            break
        union = grown
    return {"oracle_best_proposal": best, "oracle_iop": iop, "oracle_union": union}


def dense(proposals: Proposals, size: tuple[int, int]) -> np.ndarray:
    """bool (K, H, W) in the original frame ``size``."""
    masks = [rle.decode(mask) for mask in proposals.masks]
    if tuple(proposals.size) != tuple(size):
        masks = [cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST) for mask in masks]
    return np.array(masks, dtype=bool).reshape(-1, *size)


def score_oracles(
    dataset, source: ProposalSource, seed: int = 0, indices: Sequence[int] | None = None
) -> dict[str, dict[str, Any]]:
    """Name of the oracle -> {n, giou, giou_ci95, ciou, ciou_ci95} (fractions) on an EvalDataset.

    ``seed``: of the bootstrap. ``indices``: of the images, None for all.
    """
    guesses: dict[str, list[Guess]] = {}
    groups = []
    for index in range(len(dataset)) if indices is None else indices:
        sample = dataset[index]
        size = sample.image.shape[:2]
        proposals = dense(source(sample.image, sample.name), size)
        for conversation in sample.conversations:
            for target in conversation.masks:
                groups.append((sample.dataset, sample.id))
                for name, mask in oracle_masks(proposals, target, conversation.ignore).items():
                    guess = Guess.among([mask], target, conversation.ignore)
                    guesses.setdefault(name, []).append(guess)
    return {name: overlap_summary(found, groups, seed) for name, found in guesses.items()}

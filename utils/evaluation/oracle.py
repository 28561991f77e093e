"""The ceiling of a method that selects: what the best choice among the proposals would score.

K proposals of an image · H, W the original frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle

from dataset.proposals import Proposals, ProposalSource
from utils.evaluation.baselines import Guess, summary
from utils.metrics import mask_iou


def oracle_masks(
    proposals: np.ndarray, target: np.ndarray, ignore: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """What one who knows the target would choose: proposals bool (K, H, W), target and ignore bool
    (H, W) -> bool (H, W) each.

    "best proposal": one alone; "iop": the union of all that lie for more than half inside the
    target, the rule of the published code; "union": the better of both, grown by whatever proposal
    raises the IoU most, until none does. The last is greedy, so the best union could be a little
    better still.
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
    found: dict[str, list[Guess]] = {}
    groups = []
    for index in range(len(dataset)) if indices is None else indices:
        sample = dataset[index]
        proposals = dense(source(sample.image, sample.name), sample.image.shape[:2])
        for conversation in sample.conversations:
            for target in conversation.masks:
                groups.append((sample.dataset, sample.id))
                for name, mask in oracle_masks(proposals, target, conversation.ignore).items():
                    found.setdefault(name, []).append(
                        Guess.among([mask], target, conversation.ignore)
                    )
    return {name: summary(guesses, groups, seed) for name, guesses in found.items()}

"""Losses of an optimizer step as means over all of its tokens and targets, however ranks and micro
steps share them.

The model returns means over a micro batch: of n supervised tokens or targets. With W ranks and A
micro steps the engine takes the mean of W·A such losses, so a part times n·W·A / N gives the sum
over the step divided by N, the number of all of them.
"""

from __future__ import annotations

from torch import Tensor

from dataset.collate import Batch
from utils import distributed


def counts(batch: Batch) -> tuple[int, int]:
    """Supervised tokens and targets: what the text loss and the other losses of ``batch`` are means
    over."""
    return int((batch.labels[:, 1:] >= 0).sum()), sum(len(masks) for masks in batch.target_masks)


def factors(batches: list[Batch], normalisation: str) -> list[tuple[float, float]]:
    """Factors of text loss and other losses for every micro batch of a rank's optimizer step; every
    rank calls it.

    ``normalisation`` "micro" leaves the published means over micro batches. A micro batch, a rank
    or a whole step may lack targets or supervised tokens: it then adds nothing.
    """
    if normalisation == "micro":
        return [(1.0, 1.0)] * len(batches)
    own = [counts(batch) for batch in batches]
    tokens, targets = distributed.total([sum(column) for column in zip(*own, strict=True)])
    share = len(batches) * distributed.world_size()
    return [(n * share / max(tokens, 1), k * share / max(targets, 1)) for n, k in own]


def scaled(losses: dict[str, Tensor], factor: tuple[float, float]) -> dict[str, Tensor]:
    """The parts of a loss, each (), times their factor."""
    text, masks = factor
    return {name: value * (text if name == "text" else masks) for name, value in losses.items()}

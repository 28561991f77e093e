"""Losses of an optimizer step as means over all of its tokens and targets, however they are divided
among ranks and micro steps.

The model returns means over a micro batch: of n supervised tokens or targets. With W ranks and A
micro steps the engine takes the mean of W·A such losses, so a part times n·W·A / N gives the sum
over the step divided by N, the number of all of them.
"""

from __future__ import annotations

from torch import Tensor

from cores.dataset.collate import Batch
from cores.utils import distributed


def counts(batch: Batch) -> tuple[int, int]:
    """(supervised tokens, targets) of ``batch``: its text loss is a mean over the first, its other
    losses are means over the second."""
    return int((batch.labels[:, 1:] >= 0).sum()), sum(len(masks) for masks in batch.target_masks)


def factors(batches: list[Batch], normalisation: str) -> list[tuple[float, float]]:
    """(factor of the text loss, factor of the other losses) of every micro batch that this rank has
    in an optimizer step. Every rank calls it.

    ``normalisation`` "micro" keeps the means over micro batches, as the published code takes them.
    A micro batch, a rank or a whole step may lack targets or supervised tokens: its factor is 0.
    """
    if normalisation == "micro":
        return [(1.0, 1.0)] * len(batches)
    here = [counts(batch) for batch in batches]
    tokens, targets = distributed.total([sum(column) for column in zip(*here, strict=True)])
    micro_batches = len(batches) * distributed.world_size()
    return [
        (n * micro_batches / max(tokens, 1), k * micro_batches / max(targets, 1)) for n, k in here
    ]


def scaled(losses: dict[str, Tensor], factor: tuple[float, float]) -> dict[str, Tensor]:
    """The parts of a loss, each (), times their factor."""
    text, masks = factor
    return {name: value * (text if name == "text" else masks) for name, value in losses.items()}

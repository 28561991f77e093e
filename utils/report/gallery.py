"""The answers that a report shows: the worst, the best, some at random, and some without a mask.

A gallery holds a fixed number of small JPEGs, whatever the size of the evaluation set, and chooses
the same ones whatever the number of ranks: every candidate has a rank of its own, and the lowest
ranks stay.
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from utils.metrics import TargetScore
from utils.report.visualize import Example, panels

KINDS = ("worst", "random", "best", "silent")
TILE = 288  # pixels of the longer side
Order = tuple[int, int, int]  # (image, conversation, target)


@dataclass(frozen=True)
class Picture:
    """One answer, drawn. ``tiles``: (caption, JPEG) of the image, the mask of every level and the
    ground truth."""

    score: TargetScore
    tiles: list[tuple[str, bytes]]


@dataclass(frozen=True)
class Entry:
    """A picture and why it is kept: the lower ``rank`` wins, ``order`` breaks ties."""

    kind: str
    rank: float
    order: Order
    picture: Picture

    @property
    def key(self) -> tuple[float, Order]:
        return self.rank, self.order


def draw(example: Example, score: TargetScore) -> Picture:
    return Picture(score, [(caption, jpeg(tile)) for caption, tile in panels(example, TILE)])


def jpeg(tile: np.ndarray) -> bytes:
    """``tile``: uint8 (h, w, 3) RGB."""
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


class Gallery:
    """Keeps ``count`` pictures of each of KINDS. "silent" are answers without a mask; worst and
    best have one."""

    def __init__(self, count: int, seed: int = 0):
        self.count, self.seed = count, seed
        self.kept: dict[str, list[Entry]] = {kind: [] for kind in KINDS}

    def offer(self, order: Order, score: TargetScore, example: Callable[[], Example]) -> None:
        """``example`` is called only if the answer is kept for now."""
        wanted = {
            kind: rank
            for kind, rank in self._ranks(order, score).items()
            if self._enters(kind, (rank, order))
        }
        if wanted:
            picture = draw(example(), score)
            self.add(Entry(kind, rank, order, picture) for kind, rank in wanted.items())

    def _ranks(self, order: Order, score: TargetScore) -> dict[str, float]:
        chance = float(np.random.default_rng([self.seed, *order]).random())
        if not score.emitted:
            return {"silent": chance, "random": chance}
        return {"worst": score.iou, "best": -score.iou, "random": chance}

    def _enters(self, kind: str, key: tuple[float, Order]) -> bool:
        kept = self.kept[kind]
        return len(kept) < self.count or (bool(kept) and key < kept[-1].key)

    def add(self, entries: Iterable[Entry]) -> None:
        """Takes entries, of other ranks too; the same set is kept in whatever order they come."""
        for entry in entries:
            bisect.insort(self.kept[entry.kind], entry, key=lambda e: e.key)
            del self.kept[entry.kind][self.count :]

    @property
    def entries(self) -> list[Entry]:
        return [entry for kept in self.kept.values() for entry in kept]

    @property
    def pictures(self) -> dict[str, list[Picture]]:
        """Kind -> pictures, the most telling first; kinds without any are left out."""
        return {kind: [entry.picture for entry in kept] for kind, kept in self.kept.items() if kept}

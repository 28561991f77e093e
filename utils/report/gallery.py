"""The answers that a report shows: the worst, the best, some at random, and some without a mask.

A gallery holds a fixed number of small JPEGs, whatever the size of the evaluation set. It chooses
the same ones whatever the order of the answers and the number of processes, because the sort key
of an answer depends on that answer alone and the lowest keys stay.
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from PIL import Image

from cores.utils.metrics import TargetScore
from cores.utils.report.visualize import Example, panels

KINDS = ("worst", "random", "best", "without_mask")  # The worst and the best hold a mask.
TILE = 288  # pixels of the longer side
Order = tuple[int, int, int]  # indices of image, conversation and target


@dataclass(frozen=True)
class Picture:
    """One answer, drawn. ``tiles``: (caption, JPEG), see ``panels``."""

    score: TargetScore
    tiles: list[tuple[str, bytes]]


@dataclass(frozen=True)
class GalleryEntry:
    """A picture of one of KINDS; of each kind those with the lowest ``key`` are kept."""

    kind: str
    key: tuple[float, Order]
    picture: Picture


def draw_picture(example: Example, score: TargetScore) -> Picture:
    return Picture(score, [(caption, encode_jpeg(tile)) for caption, tile in panels(example, TILE)])


def encode_jpeg(tile: np.ndarray) -> bytes:
    """``tile``: uint8 (h, w, 3) RGB."""
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


class Gallery:
    """Keeps ``count`` pictures of each of KINDS."""

    def __init__(self, count: int, seed: int = 0):
        self.count, self.seed = count, seed
        self.kept: dict[str, list[GalleryEntry]] = {kind: [] for kind in KINDS}

    def offer(self, order: Order, score: TargetScore, example: Callable[[], Example]) -> None:
        """``example`` is called only if the answer is kept for now."""
        chance = float(np.random.default_rng([self.seed, *order]).random())
        if score.emitted:
            ranks = {"worst": score.iou, "best": -score.iou, "random": chance}
        else:
            ranks = {"without_mask": chance, "random": chance}
        wanted = [kind for kind, rank in ranks.items() if self._enters(kind, (rank, order))]
        if wanted:
            picture = draw_picture(example(), score)
            self.add(GalleryEntry(kind, (ranks[kind], order), picture) for kind in wanted)

    def _enters(self, kind: str, key: tuple[float, Order]) -> bool:
        kept = self.kept[kind]
        return len(kept) < self.count or (bool(kept) and key < kept[-1].key)

    def add(self, entries: Iterable[GalleryEntry]) -> None:
        """Takes entries, also those of other processes; the same ones are kept in whatever order
        they come."""
        for entry in entries:
            bisect.insort(self.kept[entry.kind], entry, key=attrgetter("key"))
            del self.kept[entry.kind][self.count :]

    @property
    def entries(self) -> list[GalleryEntry]:
        return [entry for kept in self.kept.values() for entry in kept]

    @property
    def pictures(self) -> dict[str, list[Picture]]:
        """Kind -> pictures, the most telling first; kinds without any are left out."""
        return {kind: [entry.picture for entry in kept] for kind, kept in self.kept.items() if kept}

"""Trivial baselines, masks that took no reasoning: the whole image, the largest object, a random
part of the right name.

A method that does not beat them has learnt no more than the data set's habits. The whole image
works for every data set; the other baselines read the ``scene`` that SynthReason writes into its
JSONs. Where a baseline guesses, its score is the exact expectation over all guesses, so it needs no
seed and has no noise. H, W an image in the original frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cores.dataset.files.errors import DataError
from cores.dataset.files.rle import decode_rle
from cores.dataset.files.text import read_json
from cores.dataset.readers.reasoning import ReasoningSegmentation
from cores.utils.metrics import intersection_and_union, iou, overlap_summary


class Guess(NamedTuple):
    """Expected scores of one baseline on one target, over all its equally likely guesses."""

    inter: float
    union: float
    iou: float

    @classmethod
    def among(
        cls, masks: Sequence[np.ndarray], target: np.ndarray, ignore: np.ndarray | None = None
    ) -> Guess:
        """The expectation where one of ``masks`` is predicted, each with the same probability. All
        masks are bool (H, W)."""
        inter, union = intersection_and_union(np.stack(masks), target, ignore)
        return cls(float(inter.mean()), float(union.mean()), float(iou(inter, union).mean()))


@dataclass(frozen=True)
class AnnotatedObject:
    """An object of a scene with its parts."""

    mask: np.ndarray
    """bool (H, W)."""
    parts: list[tuple[str, np.ndarray]]
    """(name, bool (H, W)) of every instance of a part: a car has two entries "wheel"."""

    def union(self, name: str) -> np.ndarray | None:
        """All its parts of that name, bool (H, W), or None if it has none."""
        masks = [mask for part, mask in self.parts if part == name]
        return np.any(masks, axis=0) if masks else None


@dataclass(frozen=True)
class SceneBaselines:
    """The baselines of one query about a known scene: pure functions of the scene."""

    objects: list[AnnotatedObject]
    part: str
    """Name of the part that the query means."""

    @classmethod
    def from_record(
        cls, record: dict[str, Any], size: tuple[int, int], path: str | Path
    ) -> SceneBaselines:
        """From a SynthReason JSON with "scene" and "target", for an image of ``size`` (H, W).

        Raises DataError naming ``path`` and the field that is missing or malformed.
        """

        def mask(entry: dict[str, Any], field: str) -> np.ndarray:
            return decode_rle(entry["rle"], size, path, f"scene.{field}.rle")

        try:
            objects = [
                AnnotatedObject(
                    mask(entry, "objects"),
                    [(part["name"], mask(part, "objects.parts")) for part in entry["parts"]],
                )
                for entry in record["scene"]["objects"]
            ]
            part = record["target"]["part"]
        except (KeyError, TypeError) as error:
            raise DataError(
                f'{path}: "scene" and "target" are not as SynthReason writes them ({error!r})'
            ) from None
        if not any(name == part for scene_object in objects for name, _ in scene_object.parts):
            raise DataError(f'{path}: "target.part" is {part!r}, which no object of "scene" has')
        return cls(objects, part)

    def largest_object(self) -> list[np.ndarray]:
        return [max((o.mask for o in self.objects), key=np.sum)]

    def random_part_of_the_right_name(self) -> list[np.ndarray]:
        """Every instance of the part in the scene, on whichever object."""
        return [mask for o in self.objects for name, mask in o.parts if name == self.part]

    def right_part_of_a_random_host(self) -> list[np.ndarray]:
        """For every object that has the part, all its instances of it."""
        return [mask for o in self.objects if (mask := o.union(self.part)) is not None]

    def score(self, target: np.ndarray, ignore: np.ndarray | None = None) -> dict[str, Guess]:
        """Baseline -> its expected score on ``target``, bool (H, W)."""
        guesses = (
            self.largest_object,
            self.random_part_of_the_right_name,
            self.right_part_of_a_random_host,
        )
        return {guess.__name__: Guess.among(guess(), target, ignore) for guess in guesses}


def _record_paths(loader, index: int, count: int) -> list[Path | None]:
    """The JSON that each of the ``count`` conversations about image ``index`` comes from, None
    where the data set keeps no such files."""
    if not isinstance(loader, ReasoningSegmentation):
        return [None] * count
    texts = 1 if loader.options.texts == "first" else None
    return [query.path for query in loader.queries[index] for _ in query.texts[:texts]]


def score_baselines(
    dataset, seed: int = 0, indices: Sequence[int] | None = None
) -> dict[str, dict[str, Any]]:
    """Baseline -> {n, giou, giou_ci95, ciou, ciou_ci95} (fractions) on an EvalDataset.

    Baselines that need a ``scene`` are there only if every query has one. ``seed``: of the
    bootstrap. ``indices``: of the images to score, None for all.
    """
    guesses: dict[str, list[Guess]] = {"whole_image": []}
    groups = []
    for index in range(len(dataset)) if indices is None else indices:
        sample = dataset[index]
        size = sample.image.shape[:2]
        paths = _record_paths(dataset.loader, index, len(sample.conversations))
        for conversation, path in zip(sample.conversations, paths, strict=True):
            scene = None
            if path is not None and "scene" in (record := read_json(path)):
                scene = SceneBaselines.from_record(record, size, path)
            for target in conversation.masks:
                groups.append((sample.dataset, sample.id))
                whole = Guess.among([np.ones(size, dtype=bool)], target, conversation.ignore)
                guesses["whole_image"].append(whole)
                if scene is not None:
                    for name, guess in scene.score(target, conversation.ignore).items():
                        guesses.setdefault(name, []).append(guess)
    complete = {name: found for name, found in guesses.items() if len(found) == len(groups)}
    return {name: overlap_summary(found, groups, seed) for name, found in complete.items()}

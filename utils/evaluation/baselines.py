"""What a mask is worth that took no reasoning: the whole image, the largest object, a random part
of the right name.

A method that does not beat these has learnt the data set's habits only. Whole image works for every
data set; the others read the ``scene`` that SynthReason writes into its JSONs. Where a baseline
guesses, its score is the exact expectation over all guesses, so it needs no seed and has no noise.
H, W an image in the original frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset.conversation.turns import Conversation
from dataset.files.errors import DataError
from dataset.files.rle import decode_rle
from dataset.files.text import read_json
from dataset.readers.reasoning import ReasoningSegmentation
from dataset.sample import Sample
from utils.metrics import bootstrap, ciou, giou, intersection_and_union, iou


@dataclass(frozen=True)
class Guess:
    """Expected scores of one baseline on one target, over all its equally likely guesses."""

    inter: float
    union: float
    iou: float

    @classmethod
    def among(
        cls, masks: Sequence[np.ndarray], target: np.ndarray, ignore: np.ndarray | None = None
    ) -> Guess:
        """One of ``masks`` is predicted, each with the same probability. All masks are bool (H,
        W)."""
        inter, union = intersection_and_union(np.stack(masks), target, ignore)
        return cls(float(inter.mean()), float(union.mean()), float(iou(inter, union).mean()))


@dataclass(frozen=True)
class SceneObject:
    """``mask``: bool (H, W). ``parts``: (name, bool (H, W)) of every part instance; a car has two
    entries "wheel"."""

    mask: np.ndarray
    parts: list[tuple[str, np.ndarray]]

    def union(self, name: str) -> np.ndarray | None:
        """All its parts of that name, bool (H, W), or None if it has none."""
        masks = [mask for part, mask in self.parts if part == name]
        return np.any(masks, axis=0) if masks else None


@dataclass(frozen=True)
class SceneBaselines:
    """The baselines of one query about a known scene: pure functions of the scene."""

    objects: list[SceneObject]
    part: str
    """Name of the part that the query means."""

    @classmethod
    def from_record(
        cls, record: dict[str, Any], size: tuple[int, int], path: str | Path
    ) -> SceneBaselines:
        """From a SynthReason JSON with "scene" and "target", for an image of ``size`` (H, W).

        Raises DataError naming ``path`` and the field that is missing or malformed.
        """
        try:
            objects = [
                SceneObject(
                    decode_rle(entry["rle"], size, path, "scene.objects.rle"),
                    [
                        (
                            part["name"],
                            decode_rle(part["rle"], size, path, "scene.objects.parts.rle"),
                        )
                        for part in entry["parts"]
                    ],
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
        """Every instance of the part in the scene, whoever it belongs to."""
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


def _conversations(dataset, index: int) -> Iterator[tuple[Sample, Conversation, Path | None]]:
    """The conversations of an image, with the JSON they come from where there is one."""
    sample, loader = dataset[index], dataset.loader
    paths: list[Path | None] = [None] * len(sample.conversations)
    if isinstance(loader, ReasoningSegmentation):
        count = 1 if loader.options.texts == "first" else None
        paths = [query.path for query in loader.queries[index] for _ in query.texts[:count]]
    for conversation, path in zip(sample.conversations, paths, strict=True):
        yield sample, conversation, path


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
        for sample, conversation, path in _conversations(dataset, index):
            size = sample.image.shape[:2]
            record = {} if path is None else read_json(path)
            scene = SceneBaselines.from_record(record, size, path) if "scene" in record else None
            for target in conversation.masks:
                groups.append((sample.dataset, sample.id))
                whole = Guess.among([np.ones(size, dtype=bool)], target, conversation.ignore)
                found = {"whole_image": whole} | (
                    scene.score(target, conversation.ignore) if scene else {}
                )
                for name, guess in found.items():
                    guesses.setdefault(name, []).append(guess)
    return {
        name: summary(found, groups, seed)
        for name, found in guesses.items()
        if len(found) == len(groups)
    }


def summary(
    guesses: Sequence[Guess], groups: Sequence[tuple[str, str]], seed: int
) -> dict[str, Any]:
    """{n, giou, giou_ci95, ciou, ciou_ci95} of one guess per target. ``groups``: the image of each,
    for the bootstrap."""
    inter, union, ious = (
        np.array([getattr(g, name) for g in guesses]) for name in ("inter", "union", "iou")
    )
    intervals = bootstrap(inter, union, ious, groups, seed=seed)
    return {
        "n": len(guesses),
        "giou": giou(ious),
        "giou_ci95": intervals["giou"],
        "ciou": ciou(inter, union),
        "ciou_ci95": intervals["ciou"],
    }

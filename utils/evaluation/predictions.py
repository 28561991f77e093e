"""Masks of another system, scored with the code that scores ours.

They are a folder of PNGs, one per target, named by sample, in which the larger of two values is the
mask::

    <id>.png                          the first target of the first question about an image
    <id>.<conversation>.png           the first target of another one: --eval_texts all, or several
                                      queries per image
    <id>.<conversation>.<target>.png  any target; both count from 0

or a JSON list in the manner of COCO results::

    {"image_id": id, "conversation": 0, "target": 0, "answer": text,
     "segmentation": {"size": [H, W], "counts": …}}

where conversation, target and answer may be left out. A segmentation may be polygons, and what
COCO's own evaluation reads is read, too: an "image_id" that is a number is that of the photo in
COCO's file, and of an image that is asked about several categories, "category_id" says which one is
answered. The sample's id is the name of its image file
without the ending, with the folders in front where several images share it: cam1/0001.png for
cam1/0001.jpg. A target without a prediction scores as one without a mask: 0, or 1 where the
target is empty. A file that two images may claim, such as a.0.png where they are a.jpg and a.0.jpg,
is an error; the list can tell them apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cores.dataset.annotations.masks import annotation_mask, read_mask
from cores.dataset.files.errors import DataError
from cores.dataset.files.images import whole_number
from cores.dataset.files.paths import list_files, list_folders
from cores.dataset.files.text import read_json
from cores.utils.evaluation.collector import Collector, GroundTruth
from cores.utils.evaluation.runner import evenly_spaced, shards_of
from cores.utils.report.results import Report

LEVEL = "prediction"  # the name of the only mask of a target, in captions
USE_A_LIST = 'give a JSON list, where "image_id", "conversation" and "target" are apart'


class TargetKey(NamedTuple):
    """Which target a prediction answers."""

    id: str | int
    """A number is the photo's in a file in COCO's format."""
    conversation: int
    target: int
    category: int | None = None
    """Of an entry that says this instead of the conversation."""

    def __str__(self) -> str:
        if self.category is not None:
            return f"{self.id}, category {self.category}"
        return self.names[0] if self.conversation or self.target else str(self.id)

    @property
    def names(self) -> list[str]:
        """The file names, without ending, that mean this target, the full one first."""
        full = [f"{self.id}.{self.conversation}.{self.target}"]
        if self.target == 0:
            full.append(f"{self.id}.{self.conversation}")
            if self.conversation == 0:
                full.append(str(self.id))
        return full


@dataclass(frozen=True)
class AskedTarget:
    """A target, with all that a prediction may call it."""

    key: TargetKey
    image: str
    """The path of the image."""
    number: int | None = None
    """The photo's in a file in COCO's format."""
    category: int | None = None
    """What is asked for, of data in COCO's format."""

    def names(self, categories: Collection[int]) -> list[Name]:
        """``categories``: those of all predictions."""
        key = self.key
        found: list[Name] = [*key.names]
        ids: list[str | int] = [key.id, f"{key.id}{Path(self.image).suffix}"]
        digits = str(key.id)
        named = int(digits) if digits.isascii() and digits.isdigit() else None
        ids += sorted({number for number in (self.number, named) if number is not None})
        # A category that the data know names the question; otherwise the only one is the first's.
        if self.category is not None:
            fitting: Collection[int] = (self.category,)
        else:
            fitting = categories if key.conversation == 0 else ()
        for id in ids:
            found.append(TargetKey(id, key.conversation, key.target))
            if key.target == 0:
                found += [TargetKey(id, 0, 0, category) for category in fitting]
        return found


# A file is known by its name, which may mean several targets; an entry of a list by its one target.
Name = str | TargetKey
ReadMask = Callable[[tuple[int, int]], np.ndarray]  # size (H, W) -> bool (H, W)


class Predictions:
    """Predictions by name; a mask is read when it is asked for."""

    def __init__(self, path: Path, masks: dict[Name, ReadMask], answers: dict[Name, str]):
        self.path, self._masks, self._answers = path, masks, answers
        self.used: dict[Name, AskedTarget] = {}
        """Which target took a prediction."""
        self.categories = {
            name.category
            for name in masks
            if isinstance(name, TargetKey) and name.category is not None
        }
        """Of entries that say which category of an image they answer."""
        self.missing: list[str] = []
        """Targets that were asked for and have no prediction."""

    @classmethod
    def read(cls, path: str | Path) -> Predictions:
        """Predictions of a folder or of a JSON file. Raises DataError naming file and field."""
        path = Path(path)
        if not path.exists():
            raise DataError(
                f"{path}: does not exist; give a folder of PNGs or a JSON list (--predictions)"
            )
        return cls._of_folder(path) if path.is_dir() else cls._of_json(path)

    @classmethod
    def _of_folder(cls, path: Path) -> Predictions:
        by_name: dict[str, Path] = {}
        for file in _pngs(path):
            name = file.relative_to(path).with_name(file.stem).as_posix()
            if name in by_name:
                raise DataError(
                    f"{by_name[name]} and {file.name} are predictions for the same target; keep one"
                )
            by_name[name] = file
        if not by_name:
            raise DataError(f"{path}: holds no PNG; name every mask by its sample, <id>.png")
        return cls(path, {name: partial(read_mask, file) for name, file in by_name.items()}, {})

    @classmethod
    def _of_json(cls, path: Path) -> Predictions:
        entries = read_json(path)
        if not isinstance(entries, list) or not entries:
            is_coco = isinstance(entries, dict) and isinstance(entries.get("annotations"), list)
            raise DataError(
                f'{path}: must be a list of {{"image_id": …, "segmentation": …}} with at least one'
                f" entry{'; give its list of annotations' if is_coco else ''}"
            )
        masks: dict[Name, ReadMask] = {}
        answers: dict[Name, str] = {}
        for i, entry in enumerate(entries):
            name = _key(entry, path, i)
            if name in masks:
                mend = "keep one"
                if name.category is not None:
                    mend += ', or join their masks: a question is about all of a category; "score"'
                    mend += " is not read"
                raise DataError(f"{path}: [{i}] is the second prediction for {name}; {mend}")
            where = f"[{i}].segmentation"
            masks[name] = partial(annotation_mask, entry["segmentation"], path=path, field=where)
            answers[name] = str(entry.get("answer") or "")
        return cls(path, masks, answers)

    @property
    def unused(self) -> list[str]:
        """Predictions that no target has taken."""
        return [str(name) for name in self._masks if name not in self.used]

    def _take(self, asked: AskedTarget) -> Name | None:
        """The prediction for a target, which no other target may take from now on."""
        key, image = asked.key, asked.image
        found = [name for name in asked.names(self.categories) if name in self._masks]
        if len(found) > 1:
            is_file = isinstance(found[0], str)
            files = " and ".join(f"{name}.png" if is_file else str(name) for name in found[:2])
            mend = USE_A_LIST if is_file else 'say with "conversation" which question each answers,'
            raise DataError(
                f"{self.path}: {files} are both predictions for {key}; keep one, or {mend} if"
                " they are not"
            )
        if not found:
            return None
        first = self.used.setdefault(found[0], asked)
        if first != asked:
            taken, of = first.key, first.image
            mend = "rename one of the images" if taken == key else USE_A_LIST
            if not isinstance(found[0], str):
                mend = 'give the name of the image file as "image_id"'
            name = f"{found[0]}.png" if isinstance(found[0], str) else found[0]
            raise DataError(
                f"{self.path}: {name} may be the prediction for {taken} ({of}) and for {key}"
                f" ({image}); {mend}"
            )
        return found[0]

    def mask(self, asked: AskedTarget, size: tuple[int, int]) -> np.ndarray | None:
        """The mask of a target, bool (H, W) of this ``size``, or None, which is remembered in
        ``missing``.

        Raises DataError naming the file for another size, for anything unreadable, for two
        predictions of one target and for one that may be meant for two.
        """
        name = self._take(asked)
        if name is None:
            self.missing.append(str(asked.key))
            return None
        return self._masks[name](size)

    def answer(self, asked: AskedTarget) -> str:
        """The text of the system's answer, "" where the predictions do not hold it."""
        return self._answers.get(self._take(asked) or "", "")

    def extra_masks(self, first: AskedTarget, targets: int) -> int:
        """The number of predictions for the conversation of its ``first`` target beyond the
        ``targets`` that it has."""
        count = 0
        while self._take(replace(first, key=first.key._replace(target=targets + count))):
            count += 1
        return count


def _pngs(folder: Path) -> Iterator[Path]:
    """The PNGs of a folder and of all folders in it."""
    yield from list_files(folder, [".png"])
    for inner in list_folders(folder):
        yield from _pngs(inner)


def _key(entry: Any, path: Path, index: int) -> TargetKey:
    if not isinstance(entry, dict) or "segmentation" not in entry:
        raise DataError(
            f'{path}: [{index}] has no "segmentation"; write {{"image_id": …, "segmentation":'
            ' {"size", "counts"}}'
        )
    found = entry.get("image_id", entry.get("id"))
    if not isinstance(found, str) and (found := whole_number(found)) is None:
        raise DataError(
            f'{path}: [{index}] has no "image_id", the name of the image file without its ending'
        )
    numbers = [entry.get("conversation", 0), entry.get("target", 0)]
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
        raise DataError(
            f'{path}: [{index}] "conversation" and "target" must be whole numbers from 0'
        )
    says_which = bool(entry.keys() & {"conversation", "target"})
    category = None if says_which else whole_number(entry.get("category_id"))
    return TargetKey(found, numbers[0], numbers[1], category)


def score_predictions(
    predictions: Predictions,
    dataset,
    mode: str = "free",
    examples: int = 0,
    gallery: int = 0,
    seed: int = 0,
) -> Report:
    """The report that ``utils.evaluation.runner.evaluate`` would give if a model answered with
    these masks.

    ``mode``: how the system answered, "free" or "teacher_forced". Raises DataError if no prediction
    fits.
    """
    started, indices = time.perf_counter(), range(len(dataset))
    known = getattr(dataset.loader, "names", {}) if predictions.categories else {}
    if known and (strange := sorted(predictions.categories - set(known))):
        raise DataError(
            f'{predictions.path}: "category_id" {strange[0]} is no category of'
            f" {dataset.loader.dataset}; write the ids of its file ({min(known)} to {max(known)})"
        )
    collector = Collector([LEVEL], set(evenly_spaced(len(indices), examples)), gallery, seed)
    for shard in shards_of(dataset, indices):
        sample, image = shard.sample, shard.sample.image_path
        size = sample.image.shape[:2]
        for number, conversation in enumerate(sample.conversations, start=shard.first):
            asked = [
                AskedTarget(
                    TargetKey(sample.id, number, k), image, sample.number, conversation.category
                )
                for k in range(len(conversation.masks))
            ]
            masks = [_tensor(predictions.mask(target, size)) for target in asked]
            truth = GroundTruth(
                index=shard.index,
                sample=sample,
                conversation=number,
                query=conversation.turns[-1][0],
                is_sentence=conversation.is_sentence,
                targets=torch.from_numpy(conversation.masks),
                ignore=_tensor(conversation.ignore),
                hosts=_tensor(conversation.host_masks),
            )
            collector.add(
                truth,
                [None if mask is None else mask[None] for mask in masks],
                predictions.answer(asked[0]),
                predictions.extra_masks(asked[0], len(asked)),
            )
    if not predictions.used:
        wanted = ", ".join(predictions.missing[:3])
        raise DataError(
            f"{predictions.path}: no prediction belongs to {dataset.loader.dataset}; "
            f"found {predictions.unused[0]}, expected names such as {wanted}"
        )
    return collector.report(mode, dataset, time.perf_counter() - started)


def _tensor(mask: np.ndarray | None) -> torch.Tensor | None:
    return None if mask is None else torch.from_numpy(mask)

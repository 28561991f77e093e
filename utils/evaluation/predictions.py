"""Masks of another system, scored with the code that scores ours.

A folder of PNGs, one per target, named by sample; two values, of which the larger is the mask::

    <id>.png                          the first target of the first question about an image
    <id>.<conversation>.png           the first target of another one (--eval_texts all, or several queries per image)
    <id>.<conversation>.<target>.png  any target; both count from 0

or a JSON list in the manner of COCO results::

    {"image_id": id, "conversation": 0, "target": 0, "answer": text, "segmentation": {"size": [H, W], "counts": …}}

where conversation, target and answer may be left out. The sample's id is the name of its image file
without the ending. A target without a prediction scores as one without a mask: 0, or 1 where
nothing was meant. A file that two images may claim, such as a.0.png where they are a.jpg and
a.0.jpg, is an error; the list can tell them apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dataset.conversation.turns import Conversation
from dataset.files.errors import DataError
from dataset.files.images import check_size, read_label
from dataset.files.paths import list_files
from dataset.files.rle import decode_rle
from dataset.files.text import read_json
from utils.evaluation.run import Collector, Part, Truth, evenly_spaced, parts_of
from utils.report.results import Report

LEVEL = "prediction"  # there is one mask per target, and it is the last
LIST = 'give a JSON list, where "image_id", "conversation" and "target" are apart'


class Key(NamedTuple):
    """Which target a prediction answers."""

    id: str
    conversation: int
    target: int

    def __str__(self) -> str:
        return (
            f"{self.id}.{self.conversation}.{self.target}"
            if self.conversation or self.target
            else self.id
        )

    @property
    def names(self) -> list[str]:
        """The file names, without ending, that mean this target."""
        full = [f"{self.id}.{self.conversation}.{self.target}"]
        if self.target == 0:
            full.append(f"{self.id}.{self.conversation}")
            if self.conversation == 0:
                full.append(self.id)
        return full


Name = str | Key  # a file may mean several targets, an entry of a list is about one


class Predictions:
    """Predictions by name; each mask is read when it is asked for.

    ``missing``: targets that were asked for and not predicted, ``unused``: names that nobody asked
    for.
    """

    def __init__(
        self,
        path: Path,
        masks: dict[Name, Callable[[tuple[int, int]], np.ndarray]],
        answers: dict[Name, str],
    ):
        self.path, self._masks, self._answers = path, masks, answers
        self._used: dict[Name, tuple[Key, str]] = {}
        """For which target of which image."""
        self.missing: list[str] = []

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
        files = list_files(path, [".png"])
        if not files:
            raise DataError(f"{path}: holds no PNG; name every mask by its sample, <id>.png")
        by_name = {file.stem: file for file in files}
        if twice := next((file for file in files if by_name[file.stem] != file), None):
            raise DataError(
                f"{twice} and {by_name[twice.stem].name} are predictions for the same target;"
                " keep one"
            )
        return cls(
            path,
            {name: lambda size, file=file: read_mask(file, size) for name, file in by_name.items()},
            {},
        )

    @classmethod
    def _of_json(cls, path: Path) -> Predictions:
        entries = read_json(path)
        if not isinstance(entries, list) or not entries:
            raise DataError(
                f'{path}: must be a list of {{"image_id": …, "segmentation": …}} with at least one'
                " entry"
            )
        masks, answers = {}, {}
        for i, entry in enumerate(entries):
            name = _key(entry, path, i)
            if name in masks:
                raise DataError(f"{path}: [{i}] is the second prediction for {name}; keep one")
            rle = entry["segmentation"]
            masks[name] = lambda size, rle=rle, i=i: decode_rle(
                rle, size, path, f"[{i}].segmentation"
            )
            answers[name] = str(entry.get("answer") or "")
        return cls(path, masks, answers)

    @property
    def unused(self) -> list[str]:
        return [str(name) for name in self._masks if name not in self._used]

    def _take(self, key: Key, image: str) -> Name | None:
        """What is there for a target of ``image``, which nothing else may take from now on."""
        found = [name for name in (key, *key.names) if name in self._masks]
        if len(found) > 1:
            files = " and ".join(f"{name}.png" for name in found)
            raise DataError(
                f"{self.path}: {files} are both predictions for {key}; keep one, or {LIST} if they"
                " are not"
            )
        if not found:
            return None
        taken, of = self._used.setdefault(found[0], (key, image))
        if (taken, of) != (key, image):
            mend = "rename one of the images" if taken == key else LIST
            name = f"{found[0]}.png" if isinstance(found[0], str) else found[0]
            raise DataError(
                f"{self.path}: {name} may be the prediction for {taken} ({of}) and for {key}"
                f" ({image}); {mend}"
            )
        return found[0]

    def mask(self, key: Key, size: tuple[int, int], image: str) -> np.ndarray | None:
        """The mask of a target, bool (H, W) of this ``size``, or None, which is remembered in
        ``missing``. ``image``: its path.

        Raises DataError naming the file for another size, for anything unreadable, for two
        predictions of one target and for one that may be meant for two.
        """
        name = self._take(key, image)
        if name is None:
            self.missing.append(str(key))
            return None
        return self._masks[name](size)

    def answer(self, key: Key, image: str) -> str:
        """What the system said, where the predictions tell it."""
        return self._answers.get(self._take(key, image) or "", "")

    def surplus(self, id: str, conversation: int, targets: int, image: str) -> int:
        """Predictions for targets of a conversation beyond the ``targets`` that it has."""
        count = 0
        while self._take(Key(id, conversation, targets + count), image):
            count += 1
        return count


def _key(entry: Any, path: Path, index: int) -> Key:
    if not isinstance(entry, dict) or "segmentation" not in entry:
        raise DataError(
            f'{path}: [{index}] has no "segmentation"; write {{"image_id": …, "segmentation":'
            ' {"size", "counts"}}'
        )
    found = entry.get("image_id", entry.get("id"))
    if isinstance(found, bool) or not isinstance(found, (str, int)):
        raise DataError(
            f'{path}: [{index}] has no "image_id", the name of the image file without its ending'
        )
    numbers = [entry.get("conversation", 0), entry.get("target", 0)]
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
        raise DataError(
            f'{path}: [{index}] "conversation" and "target" must be whole numbers from 0'
        )
    return Key(str(found), *numbers)


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A PNG of two values as bool (H, W): 0 and any other. Raises DataError naming the file."""
    label = read_label(path)
    check_size(label.shape, size, path, "the mask")
    values = np.unique(label)
    if len(values[values != 0]) > 1:
        raise DataError(
            f"{path}: a mask has two values, 0 and another; this image has {len(values)}:"
            " threshold it"
        )
    return label != 0


def score_predictions(
    predictions: Predictions,
    dataset,
    mode: str = "free",
    examples: int = 0,
    gallery: int = 0,
    seed: int = 0,
) -> Report:
    """The report that ``utils.evaluation.evaluate`` would give if a model answered with these
    masks.

    ``mode``: how the system answered, "free" or "teacher_forced". Raises DataError if no prediction
    fits.
    """
    started, indices = time.perf_counter(), range(len(dataset))
    collector = Collector([LEVEL], set(evenly_spaced(len(indices), examples)), gallery, seed)
    for part in parts_of(dataset, indices):
        for offset, conversation in enumerate(part.sample.conversations):
            _score(predictions, collector, part, part.first + offset, conversation)
    if not predictions._used:
        wanted = ", ".join(predictions.missing[:3])
        raise DataError(
            f"{predictions.path}: no prediction belongs to {dataset.loader.dataset}; "
            f"found {predictions.unused[0]}, expected names such as {wanted}"
        )
    return collector.report(mode, dataset, time.perf_counter() - started)


def _score(
    predictions: Predictions,
    collector: Collector,
    part: Part,
    number: int,
    conversation: Conversation,
) -> None:
    keys = [Key(part.sample.id, number, k) for k in range(len(conversation.masks))]
    image = part.sample.image_path
    found = [predictions.mask(key, part.sample.image.shape[:2], image) for key in keys]
    truth = Truth(
        sample=part.sample,
        conversation=number,
        query=conversation.turns[-1][0],
        is_sentence=conversation.is_sentence,
        targets=torch.from_numpy(conversation.masks),
        ignore=None if conversation.ignore is None else torch.from_numpy(conversation.ignore),
        hosts=(
            None if conversation.host_masks is None else torch.from_numpy(conversation.host_masks)
        ),
    )
    groups = [None if mask is None else torch.from_numpy(mask)[None] for mask in found]
    surplus = predictions.surplus(part.sample.id, number, len(keys), image)
    collector.add(part.index, truth, groups, predictions.answer(keys[0], image), surplus)

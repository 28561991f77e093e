"""COCO-format instances: "the dog" is the union of its instances.

::

    <dataset_dir>/coco/annotations/instances_<split>.json
    <dataset_dir>/coco/<split>/*.jpg

Crowd regions of the asked category are neither target nor background: they become the ignore mask.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as rle_codec

from dataset.conversation.turns import Conversation
from dataset.conversation.wordings import answer, phrase_question
from dataset.files.errors import DataError, MissingDataError
from dataset.files.images import read_claimed
from dataset.files.index import CocoIndex, RecordIndex
from dataset.files.paths import named_inside, require_folder, resolve_inside
from dataset.files.rle import decode_rle
from dataset.readers.exclusion import without_excluded
from dataset.sample import LoaderOptions, Sample

logger = logging.getLogger(__name__)

LARGEST = 1e6  # pixels; no image is larger, so a coordinate beyond it is a mistake


def without_missing(
    records: Sequence,
    names: list[str],
    folder: Path,
    source: Path,
    options: LoaderOptions,
    dataset: str,
) -> Sequence:
    """The ``records`` whose image (``names``, in the same order) is in ``folder``, without those on
    the skip list.

    Raises MissingDataError for the first that is not there, unless ``options`` say to skip them,
    which logs how many were left out.
    """
    if options.faults.has_skip_list:
        wanted = [not options.faults.skips(dataset, folder / name) for name in names]
        records = [record for record, ok in zip(records, wanted, strict=True) if ok]
        names = [name for name, ok in zip(names, wanted, strict=True) if ok]
        if not names:
            return records
    parents = {name[: name.rfind("/") + 1] for name in names}
    places = {parent: named_inside(folder, parent) if parent else folder for parent in parents}
    there = {
        parent: {path.name for path in place.iterdir()} if place.is_dir() else set()
        for parent, place in places.items()
    }
    present = [name[name.rfind("/") + 1 :] in there[name[: name.rfind("/") + 1]] for name in names]
    missing = [name for name, ok in zip(names, present, strict=True) if not ok]
    if not missing:
        return records
    message = (
        f"{source}: {len(missing)} of {len(names)} images are not in {folder}, for example"
        f" {missing[0]}"
    )
    if not options.skip_missing:
        raise MissingDataError(f"{message}; restore them or set --on_bad_sample skip")
    logger.warning("%s; their entries are left out", message)
    options.faults.note_all(
        dataset, [(folder / name, f"{folder / name}: image does not exist") for name in missing]
    )
    kept = [record for record, ok in zip(records, present, strict=True) if ok]
    if not kept:
        raise MissingDataError(f"{message}; nothing is left to load")
    return kept


def usable(
    index: CocoIndex | RecordIndex,
    positions: Sequence[int],
    name_of: Sequence[str],
    folder: Path,
    options: LoaderOptions,
    dataset: str,
) -> np.ndarray:
    """The ``positions`` in ``index``, int64, whose image may be trained on, is in ``folder`` and
    has no bad entry. ``name_of``: file name by position.

    Raises DataError, as ``without_excluded`` and ``without_missing`` do.
    """
    source = index.source
    positions = _without_bad(index, positions, name_of, folder, options, dataset)
    allowed = without_excluded(
        positions, [name_of[position] for position in positions], options, dataset
    )
    names = [name_of[position] for position in allowed]
    kept = without_missing(allowed, names, folder, source, options, dataset)
    if not len(kept):
        raise DataError(
            f"{source}: --skip_list leaves nothing of {dataset}; leave the data set out"
        )
    return np.array(kept, dtype=np.int64)


def _without_bad(
    index: CocoIndex | RecordIndex,
    positions: Sequence[int],
    name_of: Sequence[str],
    folder: Path,
    options: LoaderOptions,
    dataset: str,
) -> Sequence[int]:
    """``positions`` without the images of bad entries: with one annotation less, a question about
    them could have a wrong mask."""
    if not index.bad:
        return positions
    images = {bad.image for bad in index.bad} - {None}
    gone = {
        position: index.file_names[position]
        for position in positions
        if images and index.file_names[position] in images
    }
    # not always where the annotations say
    files = {name: name_of[position] for position, name in gone.items()}
    places = [
        folder / files.get(e.image, e.image) if e.image else f"{index.source}:{e.place}"
        for e in index.bad
    ]
    reasons = [f"{index.source}: {e.reason}" for e in index.bad]
    options.faults.leave_out(dataset, list(zip(places, reasons, strict=True)))
    kept = [position for position in positions if position not in gone]
    if not kept:
        raise DataError(
            f"{index.source}: no entry of {dataset} can be used, for example: {index.bad[0].reason}"
        )
    return kept


def _is_polygon(points: object) -> bool:
    """Whether pycocotools can draw it: it takes four numbers for a box, and dies without a word of
    NaN or of 1e9."""
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        return False
    try:
        values = np.array(points)
    except ValueError:  # a list of lists
        return False
    return values.ndim == 1 and values.dtype.kind in "if" and bool(np.all(np.abs(values) < LARGEST))


def annotation_mask(
    segmentation: list | dict, size: tuple[int, int], path: Path, field: str, thin: bool = False
) -> np.ndarray:
    """A COCO segmentation (polygons, run lengths, compressed run lengths, a list of either) as bool
    (H, W).

    ``thin``: polygons of one or two points, which enclose nothing, are skipped. Raises DataError
    naming ``path`` and ``field``.
    """
    if isinstance(segmentation, dict):
        return decode_rle(segmentation, size, path, field)
    if not isinstance(segmentation, list):
        raise DataError(f"{path}: {field} must be polygons or run lengths")
    mask = np.zeros(size, dtype=bool)
    polygons = [part for part in segmentation if not isinstance(part, dict)]
    for part in segmentation:
        if isinstance(part, dict):  # refCLEF: one region, several run lengths
            mask |= decode_rle(part, size, path, field)
    if thin:
        polygons = [p for p in polygons if not isinstance(p, list) or len(p) not in (2, 4)]
    if not all(map(_is_polygon, polygons)):
        raise DataError(
            f"{path}: {field} must be polygons of at least three points [x0, y0, x1, …] in pixels,"
            " or run lengths"
        )
    if not polygons:
        return mask
    try:
        return mask | rle_codec.decode(
            rle_codec.merge(rle_codec.frPyObjects(polygons, *size))
        ).astype(bool)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {field} is not a valid polygon ({error})") from None


class CocoInstances:
    """A sample is an image with questions about some of its categories."""

    def __init__(self, dataset_dir: str | Path, split: str, options: LoaderOptions):
        """``split``: "train2017", "val2017" or any other name in the layout above. Raises
        DataError."""
        self.dataset = f"coco|{split}"
        self.options = options
        root = require_folder(Path(dataset_dir) / "coco", "COCO-format data")
        self.source = named_inside(root / "annotations", f"instances_{split}.json")
        self.index = CocoIndex.open(self.source, tolerant=options.faults.leaves_out)
        self.folder = require_folder(named_inside(root, split), "the folder of this split's images")
        positions = self.index.with_instances().tolist()
        if not positions:
            raise DataError(
                f"{self.source}: split {split} is empty; no image has an annotated instance"
            )
        self.positions = usable(
            self.index, positions, self.index.file_names, self.folder, options, self.dataset
        )

    def __len__(self) -> int:
        return len(self.positions)

    def path(self, index: int) -> Path:
        """The image of sample ``index``."""
        return self.folder / self.index.file_names[int(self.positions[index])]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image ``index`` with some of its categories in training, all of them otherwise."""
        position = int(self.positions[index])
        record = self.index.image(position)
        path = resolve_inside(self.folder, record["file_name"])
        image = read_claimed(path, record, self.source.name)
        size = image.shape[:2]
        by_category: dict[int, list[dict]] = defaultdict(list)
        for entry in self.index.annotations(position):
            by_category[entry["category_id"]].append(entry)
        categories = sorted(
            c
            for c, entries in by_category.items()
            if not all(entry.get("iscrowd") for entry in entries)
        )
        if self.options.training:
            count = min(self.options.num_classes_per_sample, len(categories))
            categories = [int(c) for c in rng.choice(categories, size=count, replace=False)]
        conversations = [self._conversation(c, by_category[c], size, rng) for c in categories]
        return Sample(
            image,
            str(path),
            conversations,
            "semantic",
            self.dataset,
            Path(record["file_name"]).stem,
        )

    def _conversation(
        self, category: int, entries: list[dict], size: tuple[int, int], rng: np.random.Generator
    ) -> Conversation:
        target, crowd = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
        for entry in entries:
            mask = annotation_mask(
                entry["segmentation"], size, self.source, f'annotation {entry["id"]} "segmentation"'
            )
            union = crowd if entry.get("iscrowd") else target
            union |= mask
        crowd &= ~target
        question = phrase_question(
            f"the {self.index.categories[category]['name']}", self.options.wording(rng)
        )
        reply = answer(self.options.levels, self.options.wording(rng))
        return Conversation([(question, reply)], target[None], crowd if crowd.any() else None)

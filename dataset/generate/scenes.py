"""Photographs with marked objects, from instance annotations in the format of COCO, LVIS or
EgoObjects.

A file is read twice, entry by entry, because LVIS is 1 GB of JSON: once to choose the images, once
for the masks of the chosen ones. What the formats differ in:

- The name of an image is the last part of "file_name" (COCO), "coco_url" (LVIS has only this) or
  "url" (EgoObjects).
- LVIS lists in "not_exhaustive_category_ids" the categories of an image of which not all instances
  are marked; these are never asked for.
- EgoObjects has boxes without masks; ``python -m utils.boxes_to_masks`` makes the masks first.

H, W are the size of an image in the original frame.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cores.dataset.annotations.masks import annotation_mask
from cores.dataset.files.errors import BOXES_ONLY, DataError
from cores.dataset.files.images import claimed_size, read_claimed
from cores.dataset.files.json_stream import JsonReader, parse_stream
from cores.dataset.files.lookup import Lookup, base_name, photo_name
from cores.dataset.files.paths import require_folder
from cores.dataset.files.rle import encode_rle
from cores.dataset.readers.questions import readable_name

KINDS = ("coco", "ego_objects")


@dataclass(frozen=True)
class AnnotationSource:
    """One --source: a file of annotations and the folder of its images."""

    kind: str
    """What "from_dataset" of the result will be; LLM-Seg40K's loader finds the images by it."""
    annotations: Path
    images: Path
    wanted: tuple[tuple[int, int, int | None], ...] = ((2, 10**9, None),)
    """(fewest categories in an image, most, number of such images or None for all), …"""


@dataclass(frozen=True)
class MarkedObject:
    """All instances of one category in an image."""

    name: str
    names: tuple[str, ...]
    """The name and its synonyms."""
    count: int
    share: float
    """Part of the image's area, 0 to 1."""
    where: str
    """Centre of the mask in words, such as "top left"."""
    rle: dict[str, Any]
    """COCO run lengths of the union, {"size": [H, W], "counts": text}."""
    annotation_ids: tuple[int, ...]


@dataclass(frozen=True)
class Photograph:
    """An image and what is marked in it."""

    source: AnnotationSource
    name: str
    """File name inside the folder of the source."""
    size: tuple[int, int]
    """(H, W) that the annotations state."""
    categories: dict[str, tuple[str, ...]]
    """Name -> name and synonyms of every category that is completely marked here."""
    others: tuple[str, ...]
    """Names of categories that are there, but not completely marked."""
    annotations: dict[str, list[tuple[int, Any]]]
    """Name -> (annotation id, segmentation) of each instance; category names of ``categories``."""

    @property
    def path(self) -> Path:
        return Lookup([self.source.images]).find(self.name)

    def objects(self) -> list[MarkedObject]:
        """The marked objects, largest first. Raises DataError."""
        read_claimed(self.path, self.size, self.source.annotations.name)
        found = [self._object(name, instances) for name, instances in self.annotations.items()]
        # COCO has polygons that cover no pixel; nobody can be asked for these.
        found = [marked for marked in found if marked.share > 0]
        return sorted(found, key=lambda found: (-found.share, found.name))

    def _object(self, name: str, instances: list[tuple[int, Any]]) -> MarkedObject:
        mask, file = np.zeros(self.size, dtype=bool), self.source.annotations
        for number, segmentation in instances:
            mask |= annotation_mask(
                segmentation, self.size, file, f"annotation {number}", thin=True
            )
        return MarkedObject(
            name=name,
            names=self.categories[name],
            count=len(instances),
            share=float(mask.mean()),
            where=_where(mask),
            rle=encode_rle(mask),
            annotation_ids=tuple(number for number, _ in instances),
        )


def _where(mask: np.ndarray) -> str:
    """The third of height and width in which the centre of ``mask``, bool (H, W), lies."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return "nowhere"
    row = int(3 * rows.mean() / mask.shape[0])
    column = int(3 * columns.mean() / mask.shape[1])
    where = f"{('top', 'middle', 'bottom')[row]} {('left', 'centre', 'right')[column]}"
    return "centre" if where == "middle centre" else where.removeprefix("middle ")


def parse_wanted(text: str) -> tuple[tuple[int, int, int | None], ...]:
    """What of a source is wanted: "2-5:6000,6-:4000" -> ((2, 5, 6000), (6, 10**9, 4000)), 6,000
    images with 2 to 5 categories and 4,000 with 6 or more.

    Raises ValueError.
    """
    found: list[tuple[int, int, int | None]] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)-(\d*)(?::(\d+))?", part.strip())
        if not match:
            raise ValueError(
                f"--source: {part!r} does not say which images; write 2-5:6000 for 6000 with 2 to 5"
                " categories"
            )
        least, most = int(match[1]), int(match[2] or 10**9)
        if not 1 <= least <= most:
            raise ValueError(
                f"--source: {part!r} asks for {least} to {most} categories; the first number is at"
                " least 1"
            )
        found.append((least, most, int(match[3]) if match[3] else None))
    for (_, most, _), (least, _, _) in pairwise(sorted(found)):
        if least <= most:
            raise ValueError(f"--source: {text!r} asks twice for images with {least} categories")
    return tuple(found)


@dataclass
class _Image:
    name: str
    size: tuple[int, int]
    partly: frozenset[int]
    """Categories that are not completely marked."""


class _Survey:
    """What the first reading of a file keeps: every image, and the categories in it."""

    def __init__(self, source: Path):
        self.source = source
        self.images: dict[int, _Image] = {}
        self.names: dict[int, tuple[str, ...]] = {}
        self.present: dict[int, set[int]] = defaultdict(set)
        self.crowded: dict[int, set[int]] = defaultdict(set)

    def take(self, key: str, entry: dict) -> None:
        if key == "images":
            if (place := photo_name(entry)) is None:
                raise KeyError("file_name")
            name, size = base_name(place), claimed_size(entry, self.source)
            if size is None:
                raise KeyError("height")
            partly = frozenset(entry.get("not_exhaustive_category_ids", ()))
            self.images[entry["id"]] = _Image(name, size, partly)
        elif key == "categories":
            name = readable_name(entry["name"])
            synonyms = map(readable_name, entry.get("synonyms", ()))
            self.names[entry["id"]] = tuple(dict.fromkeys([name, *synonyms]))
        elif key == "annotations":
            self.present[entry["image_id"]].add(entry["category_id"])
            if entry.get("iscrowd"):
                self.crowded[entry["image_id"]].add(entry["category_id"])

    def complete(self, image: int) -> set[int]:
        """The categories whose every instance in the image is marked."""
        return self.present[image] - self.crowded[image] - self.images[image].partly

    def choose(
        self, folder: Path, wanted: tuple[tuple[int, int, int | None], ...], seed: int
    ) -> list[int]:
        """Ids of the images that are in ``folder`` and asked for, sorted by name."""
        gone = Lookup([folder]).missing([image.name for image in self.images.values()])
        images = sorted((im.name, i) for i, im in self.images.items() if im.name not in gone)
        chosen = []
        for least, most, count in wanted:
            fitting = [pair for pair in images if least <= len(self.complete(pair[1])) <= most]
            if count is not None and count < len(fitting):
                rng = np.random.default_rng([seed, least])
                picked = rng.choice(len(fitting), size=count, replace=False)
                fitting = [fitting[index] for index in sorted(picked)]
            chosen += fitting
        return [number for _, number in sorted(chosen)]

    def photograph(
        self, source: AnnotationSource, number: int, found: dict[int, list]
    ) -> Photograph:
        """Image ``number``. ``found``: category id -> (annotation id, segmentation) of each
        instance."""
        image = self.images[number]
        present = [self.names[category][0] for category in self.present[number]]
        # With "bat_(animal)" and "bat_(sports)" in one image nobody could tell which is meant.
        asked = {
            self.names[category]: sorted(instances, key=lambda pair: pair[0])
            for category, instances in sorted(found.items())
            if present.count(self.names[category][0]) == 1
        }
        categories = {names[0]: names for names in asked}
        annotations = {names[0]: instances for names, instances in asked.items()}
        others = tuple(sorted(set(present) - categories.keys()))
        return Photograph(source, image.name, image.size, categories, others, annotations)


def _each_entry(source: Path, keys: tuple[str, ...], take: Callable[[str, Any], None]) -> None:
    """``take(key, entry)`` of every entry of the lists ``keys``. Raises DataError."""

    def parse(reader: JsonReader) -> set[str]:
        seen = set()
        for key in reader.members():
            if key not in keys or reader.peek() != "[":
                reader.value()
                continue
            seen.add(key)
            for number, (entry, _) in enumerate(reader.items()):
                try:
                    take(key, entry)
                except (KeyError, TypeError, AttributeError) as error:
                    raise DataError(
                        f'{source}: "{key}" entry {number} lacks or misuses a field ({error})'
                    ) from None
        return seen

    missing = [key for key in keys if key not in parse_stream(source, parse)]
    if missing:
        raise DataError(
            f'{source}: has no list "{missing[0]}"; an instances file in the format of COCO is'
            " expected"
        )


def read_photographs(source: AnnotationSource, seed: int) -> list[Photograph]:
    """The photographs that ``source`` asks for, sorted by image name. Raises DataError."""
    require_folder(source.images, f"the images of {source.annotations.name}")
    survey = _Survey(source.annotations)
    _each_entry(source.annotations, ("images", "annotations", "categories"), survey.take)
    categories = set().union(*survey.present.values())
    for what, unknown in (
        ("category", categories - survey.names.keys()),
        ("image", survey.present.keys() - survey.images.keys()),
    ):
        if unknown:
            raise DataError(
                f"{source.annotations}: an annotation names the unknown {what} {min(unknown)}"
            )
    chosen = survey.choose(source.images, source.wanted, seed)
    if not chosen:
        raise DataError(f"{source.annotations}: no image of the wanted kind is in {source.images}")
    complete = {image: survey.complete(image) for image in chosen}
    segmentations: dict[int, dict[int, list]] = {image: defaultdict(list) for image in chosen}

    def take(_: str, entry: dict) -> None:
        image, category = entry["image_id"], entry["category_id"]
        if category in complete.get(image, ()):
            if not entry.get("segmentation"):
                raise DataError(f"{source.annotations}: annotation {entry['id']} {BOXES_ONLY}")
            segmentations[image][category].append((entry["id"], entry["segmentation"]))

    _each_entry(source.annotations, ("annotations",), take)
    return [survey.photograph(source, image, segmentations[image]) for image in chosen]

"""COCO-format instances: "the dog" is the union of its instances.

::

    <dataset_dir>/coco/annotations/instances_<split>.json
    <dataset_dir>/coco/<split>/*.jpg

Crowd regions of the asked category are neither target nor background: they become the ignore mask.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pycocotools import mask as rle_codec

from dataset.files.errors import DataError
from dataset.files.images import read_claimed
from dataset.files.index import CocoIndex
from dataset.files.lookup import Identities, Lookup
from dataset.files.paths import named_inside, require_folder
from dataset.files.rle import decode_rle
from dataset.readers.questions import phrase_conversation, readable_names
from dataset.readers.usable import usable_positions
from dataset.sample import LoaderOptions, Sample

LARGEST = 1e6  # pixels; no image has such a side, so a coordinate beyond it is a mistake


def _is_polygon(points: object) -> bool:
    """Whether pycocotools can draw it: it takes four numbers for a box, and NaN or 1e9 kill the
    process."""
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        return False
    try:
        values = np.array(points)
    except ValueError:  # The list holds lists of different lengths.
        return False
    return values.ndim == 1 and values.dtype.kind in "if" and bool(np.all(np.abs(values) < LARGEST))


def annotation_mask(
    segmentation: list | dict,
    size: tuple[int, int],
    path: str | Path,
    field: str,
    thin: bool = False,
) -> np.ndarray:
    """A COCO segmentation (polygons, run lengths, compressed run lengths, a list of any of them) as
    bool (H, W) for an image of ``size`` (H, W).

    ``thin``: polygons of one or two points, which enclose nothing, are skipped instead of refused.
    Raises DataError naming ``path`` and ``field``.
    """
    if isinstance(segmentation, dict):
        return decode_rle(segmentation, size, path, field)
    if not isinstance(segmentation, list):
        raise DataError(f"{path}: {field} must be polygons or run lengths")
    mask = np.zeros(size, dtype=bool)
    polygons = [part for part in segmentation if not isinstance(part, dict)]
    for part in segmentation:
        if isinstance(part, dict):  # refCLEF writes one region as several run lengths.
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
        merged = rle_codec.merge(rle_codec.frPyObjects(polygons, *size))
        return mask | rle_codec.decode(merged).astype(bool)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {field} is not a valid polygon ({error})") from None


def instance_masks(
    entries: list[dict], size: tuple[int, int], source: Path, thin: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(union of the instances, crowd regions outside of it), each bool (H, W), of annotations.
    ``thin``: as in ``annotation_mask``. Raises DataError naming ``source`` and the annotation."""
    target, crowd = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    for entry in entries:
        field = f'annotation {entry["id"]} "segmentation"'
        union = crowd if entry.get("iscrowd") else target
        union |= annotation_mask(entry["segmentation"], size, source, field, thin)
    return target, crowd & ~target


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
        folder = require_folder(named_inside(root, split), "the folder of this split's images")
        self.photos = Lookup([folder], options.follow_links)
        self.names = readable_names({n: c["name"] for n, c in self.index.categories.items()})
        if crowds := int(self.index.is_crowd.sum()):
            options.faults.remark(
                self.dataset, f"{crowds} annotations are crowds, which are ignored"
            )
        positions = self.index.with_instances().tolist()
        if not positions:
            raise DataError(
                f"{self.source}: split {split} is empty; no image has an annotated instance"
            )
        name_of = self.index.file_names.__getitem__
        self.positions = usable_positions(
            self.index, positions, name_of, self.photos, options, self.dataset
        )
        self.identities = Identities(map(name_of, self.positions.tolist()))

    def __len__(self) -> int:
        return len(self.positions)

    def path(self, index: int) -> Path:
        """The image of sample ``index``."""
        return self.photos.item(self.index.file_names[int(self.positions[index])])

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image ``index`` with some of its categories in training, all of them otherwise."""
        position = int(self.positions[index])
        record = self.index.image(position)
        path = self.photos.find(record["file_name"])
        image = read_claimed(path, record, self.source.name)
        by_category = self.index.annotations_by_category(position)
        # A category of which there is only a crowd has no instance that could be the target.
        categories = sorted(
            category
            for category, entries in by_category.items()
            if not all(entry.get("iscrowd") for entry in entries)
        )
        if self.options.training:
            count = min(self.options.num_classes_per_sample, len(categories))
            categories = [int(c) for c in rng.choice(categories, size=count, replace=False)]
        conversations = []
        for category in categories:
            masks = instance_masks(by_category[category], image.shape[:2], self.source)
            phrase = f"the {self.names[category]}"
            conversations.append(phrase_conversation(phrase, masks[0], self.options, rng, masks[1]))
        name = self.identities.of(record["file_name"])
        return Sample(image, str(path), conversations, "semantic", self.dataset, name)

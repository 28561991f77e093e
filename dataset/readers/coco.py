"""COCO-format instances: "the dog" is the union of its instances.

::

    <dataset_dir>/coco/annotations/instances_<split>.json
    <dataset_dir>/coco/<split>/*.jpg

Crowd regions of the asked category are neither target nor background: they become the ignore mask.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cores.dataset.annotations.masks import instance_masks
from cores.dataset.annotations.shapes import refuse_boxes
from cores.dataset.files.errors import DataError, NothingToAsk
from cores.dataset.files.images import claimed_size, read_claimed
from cores.dataset.files.index import CocoIndex
from cores.dataset.files.lookup import Identities, Lookup
from cores.dataset.files.paths import named_inside, require_folder
from cores.dataset.readers.questions import phrase_conversation, readable_names
from cores.dataset.readers.usable import usable_positions
from cores.dataset.sample import LoaderOptions, Sample


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
                f"{self.index.example()}"
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
        """Image ``index`` with some of its categories in training, all of them otherwise; those
        without a pixel are not asked, and ``dataset.check`` lists them.

        Raises DataError; in training NothingToAsk where no category that was drawn has a pixel.
        """
        position = int(self.positions[index])
        record = self.index.image(position)
        path = self.photos.find(record["file_name"])
        image = read_claimed(path, claimed_size(record, self.source), self.source.name)
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
            for entry in by_category[category]:
                refuse_boxes(entry, f"{self.source}: annotation {entry['id']}")
            masks = instance_masks(by_category[category], image.shape[:2], self.source)
            phrase = f"the {self.names[category]}"
            if not masks[0].any():
                self.options.faults.remark(
                    self.dataset, f"{path}: {phrase!r} covers no pixel and is not asked"
                )
                continue
            asked = phrase_conversation(phrase, masks[0], self.options, rng, masks[1])
            asked.category = category
            conversations.append(asked)
        if self.options.training and not conversations:
            raise NothingToAsk(f"{path}: no category that was drawn has a pixel in {self.source}")
        name = self.identities.of(record["file_name"])
        number = record["id"]
        return Sample(
            image, str(path), conversations, "semantic", self.dataset, name, number=number
        )

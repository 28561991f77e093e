"""Parts of objects, in COCO's format: "the wheel of the car" is every wheel of every car.

::

    paco_lvis      <dataset_dir>/vlpart/paco/annotations/paco_lvis_v1_<split>.json
                   <dataset_dir>/coco/<file_name>
    pascal_part    <dataset_dir>/vlpart/pascal_part/<split>.json
                   <dataset_dir>/vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/
    partimagenet   <dataset_dir>/vlpart/partimagenet/<split>.json
                   <dataset_dir>/vlpart/partimagenet/{images,images/<split>,<split>}/

What the published files hold: PACO-LVIS has 75 objects ("car_(automobile)") and 456 parts
("car_(automobile):wheel"); its file names begin with COCO's folder. VLPart's JSON of PASCAL-Part
has 93 parts ("bus:license plate") and run lengths. PartImageNet has 40 parts ("Quadruped Head"),
ids from 0, some polygons of one or two points, and images in folders by synset, with or without
that folder in the file name.

LISA asks for one annotation by the name of its category, so that one question may have several
answers. Here the target is the union of the category's annotations. Where the file also holds the
object (PACO), the object is the target's host.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cores.dataset.annotations.masks import instance_masks
from cores.dataset.conversation.turns import Conversation
from cores.dataset.files.errors import DataError, NothingToAsk
from cores.dataset.files.images import claimed_size, read_claimed
from cores.dataset.files.index import CocoIndex
from cores.dataset.files.lookup import Identities, Lookup
from cores.dataset.files.paths import named_inside, require_folder
from cores.dataset.readers.questions import phrase_conversation, readable_name
from cores.dataset.readers.usable import usable_positions
from cores.dataset.sample import LoaderOptions, Sample


class CategoryName(NamedTuple):
    """What a category is called: an object, or a part of one."""

    thing: str
    part: str | None = None

    def phrase(self, rng: np.random.Generator | None) -> str:
        """ "the wheel of the car" or, in half of the draws, "the car wheel"; ``rng`` None gives the
        former."""
        if self.part is None:
            return f"the {self.thing}"
        of = rng is None or rng.random() < 0.5
        return f"the {self.part} of the {self.thing}" if of else f"the {self.thing} {self.part}"


@dataclass(frozen=True)
class PartSource:
    """Where the files of a data set lie, under the data folder, and how its categories are named.
    {split} stands for the split."""

    annotations: str
    images: tuple[str, ...]
    """Folders of images; the first one that exists is taken."""
    train_split: str = "train"
    separator: str = ":"
    """Between the object and the part in a category's name."""
    linked: tuple[str, ...] = ()
    """Folders in the folder of images that may be links to folders elsewhere."""
    by_synset: bool = False
    """Images may lie in a folder named as the first nine letters of the file name."""


PART_SOURCES = {
    "paco_lvis": PartSource(
        "vlpart/paco/annotations/paco_lvis_v1_{split}.json",
        ("coco",),
        linked=("train2017", "val2017"),
    ),
    "pascal_part": PartSource(
        "vlpart/pascal_part/{split}.json", ("vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages",)
    ),
    "partimagenet": PartSource(
        "vlpart/partimagenet/{split}.json",
        (
            "vlpart/partimagenet/images/{split}",
            "vlpart/partimagenet/images",
            "vlpart/partimagenet/{split}",
        ),
        separator=" ",
        by_synset=True,
    ),
}
# Corrections of words that are misspelt or run together in the published names.
REPAIRED = {
    "tier": "tire",
    "colied tube": "coiled tube",
    "runningboard": "running board",
    "steeringwheel": "steering wheel",
    "turnsignal": "turn signal",
}


def _readable(text: str) -> str:
    """ "car_(automobile)" -> "car"."""
    plain = readable_name(text).lower()
    return REPAIRED.get(plain, plain)


def category_name(text: str, separator: str) -> CategoryName:
    """A category's name, "car_(automobile):wheel" or "Car Side Mirror", in words."""
    thing, _, part = text.strip().partition(separator)
    return CategoryName(_readable(thing), _readable(part) or None)


class PartSegmentation:
    """A sample is an image with questions about some of its parts (PACO: and objects)."""

    def __init__(
        self, dataset_dir: str | Path, name: str, options: LoaderOptions, split: str | None = None
    ):
        """``name``: a key of PART_SOURCES; ``split`` defaults to its training split. Raises
        ValueError or DataError."""
        if name not in PART_SOURCES:
            raise ValueError(
                f"unknown data set of parts {name!r}; known: {', '.join(PART_SOURCES)}"
            )
        self.options = options
        self.kind = PART_SOURCES[name]
        split = split or self.kind.train_split
        self.dataset = f"{name}|{split}"
        root = Path(dataset_dir)
        source = root / self.kind.annotations
        self.source = named_inside(
            require_folder(source.parent, f"the {name} data"), source.name.format(split=split)
        )
        self.index = CocoIndex.open(self.source, tolerant=options.faults.leaves_out)
        self.names = {
            number: category_name(entry["name"], self.kind.separator)
            for number, entry in self.index.categories.items()
        }
        folders = [root / folder.format(split=split) for folder in self.kind.images]
        self.folder = require_folder(
            next((folder for folder in folders if folder.is_dir()), folders[0]),
            f"the images of {name}",
        )
        linked = [place for part in self.kind.linked if (place := self.folder / part).is_dir()]
        self.photos = Lookup([self.folder, *linked], options.follow_links)
        positions = self.index.with_instances().tolist()
        if not positions:
            raise DataError(
                f"{self.source}: is empty; no image has an annotated part{self.index.example()}"
            )
        files = [self._file(file) for file in self.index.file_names]
        self.positions = usable_positions(
            self.index, positions, files.__getitem__, self.photos, options, self.dataset
        )
        self.identities = Identities(files[position] for position in self.positions.tolist())

    def _file(self, name: str) -> str:
        """The file, below the folder of images, of the image with that name in the annotations."""
        if self.kind.by_synset and "/" not in name and not os.path.isfile(self.folder / name):
            return f"{name[:9]}/{name}"
        return name

    def __len__(self) -> int:
        return len(self.positions)

    def path(self, index: int) -> Path:
        """The image of sample ``index``."""
        return self.photos.item(self._file(self.index.file_names[int(self.positions[index])]))

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image ``index`` with some of its categories in training, all of them otherwise; those
        without a pixel are left out.

        Raises DataError; in training NothingToAsk where no category has a pixel.
        """
        position = int(self.positions[index])
        record = self.index.image(position)
        file = self._file(record["file_name"])
        path = self.photos.find(file)
        image = read_claimed(path, claimed_size(record, self.source), self.source)
        size = image.shape[:2]
        by_category = self.index.annotations_by_category(position)
        categories = sorted(by_category)
        if self.options.training:
            categories = [int(c) for c in rng.permutation(categories)]
        conversations: list[Conversation] = []
        for category in categories:
            if self.options.training and len(conversations) == self.options.num_classes_per_sample:
                break
            target, crowd = instance_masks(by_category[category], size, self.source, thin=True)
            if target.any():
                host = self._host(category, by_category, size)
                phrase = self.names[category].phrase(self.options.wording(rng))
                asked = phrase_conversation(phrase, target, self.options, rng, crowd, host)
                asked.category = category
                conversations.append(asked)
        if self.options.training and not conversations:
            raise NothingToAsk(f"{path}: no annotation in {self.source} has a pixel")
        name = self.identities.of(file)
        number = record["id"]
        return Sample(
            image, str(path), conversations, "semantic", self.dataset, name, number=number
        )

    def _host(
        self, category: int, by_category: dict[int, list[dict]], size: tuple[int, int]
    ) -> np.ndarray | None:
        """Every object of the kind that the part belongs to, bool (H, W), or None where the
        annotations of the image hold none."""
        if self.names[category].part is None:
            return None
        kind = CategoryName(self.names[category].thing)
        objects = [
            e for c, entries in by_category.items() if self.names[c] == kind for e in entries
        ]
        host, _ = instance_masks(objects, size, self.source, thin=True)
        return host if host.any() else None

"""Parts of objects, in COCO's format: "the wheel of the car" is every wheel of every car.

::

    paco_lvis      <dataset_dir>/vlpart/paco/annotations/paco_lvis_v1_<split>.json, images coco/<file_name>
    pascal_part    <dataset_dir>/vlpart/pascal_part/<split>.json, images .../pascal_part/VOCdevkit/VOC2010/JPEGImages/
    partimagenet   <dataset_dir>/vlpart/partimagenet/<split>.json, images .../partimagenet/images/, images/<split>/ or <split>/

Facts: PACO-LVIS has 75 objects ("car_(automobile)") and 456 parts ("car_(automobile):wheel"), its
file names begin with COCO's folder; VLPart's JSON of PASCAL-Part has 93 parts ("bus:license plate")
and run lengths; PartImageNet has 40 ("Quadruped Head"), ids from 0, some polygons of one or two
points, and images in folders by synset, with or without that folder in the file name.

LISA asks for one annotation by the name of its category, so that one question may have several
answers. Here the target is the union of the category's annotations. Where the file holds the
object, too (PACO), it is the target's host.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.conversation.turns import Conversation
from dataset.conversation.wordings import answer, phrase_question
from dataset.files.errors import DataError, NothingToAsk
from dataset.files.images import read_claimed
from dataset.files.index import CocoIndex
from dataset.files.paths import named_inside, require_folder, resolve_inside
from dataset.readers.coco import annotation_mask, usable
from dataset.sample import LoaderOptions, Sample


class Name(NamedTuple):
    """What a category is called: an object, or a part of one."""

    thing: str
    part: str | None = None

    def phrase(self, rng: np.random.Generator | None) -> str:
        """ "the wheel of the car", in half of the draws "the car wheel"; ``rng`` None gives the former."""
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
    """Folders of images; the first that is there is taken."""
    train_split: str = "train"
    separator: str = ":"
    """Between the object and the part in a category's name."""
    linked: tuple[str, ...] = ()
    """Folders in the folder of images that the user may have made links."""
    by_synset: bool = False
    """Images may lie in a folder named as the first nine letters of the file name."""


SOURCES = {
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
# What is misspelt or run together in the published names.
REPAIRED = {
    "tier": "tire",
    "colied tube": "coiled tube",
    "runningboard": "running board",
    "steeringwheel": "steering wheel",
    "turnsignal": "turn signal",
}


def _readable(text: str) -> str:
    """ "car_(automobile)" -> "car"."""
    plain = " ".join(re.sub(r"_?\(.*?\)", "", text).replace("_", " ").lower().split())
    return REPAIRED.get(plain, plain)


def category_name(text: str, separator: str) -> Name:
    """A category's name, "car_(automobile):wheel" or "Car Side Mirror", in words."""
    thing, _, part = text.strip().partition(separator)
    return Name(_readable(thing), _readable(part) or None)


class PartSegmentation:
    """A sample is an image with questions about some of its parts (PACO: and objects)."""

    def __init__(
        self, dataset_dir: str | Path, name: str, options: LoaderOptions, split: str | None = None
    ):
        """``name``: a key of SOURCES; ``split`` defaults to its training split. Raises ValueError
        or DataError."""
        if name not in SOURCES:
            raise ValueError(f"unknown data set of parts {name!r}; known: {', '.join(SOURCES)}")
        self.options = options
        self.kind = SOURCES[name]
        split = split or self.kind.train_split
        self.dataset = f"{name}|{split}"
        root = Path(dataset_dir)
        source = root / self.kind.annotations
        self.source = named_inside(
            require_folder(source.parent, f"the {name} data"), source.name.format(split=split)
        )
        self.index = CocoIndex.open(self.source, tolerant=options.faults.leaves_out)
        self.names = {
            i: category_name(c["name"], self.kind.separator)
            for i, c in self.index.categories.items()
        }
        self.folder = self._folder(
            [root / folder.format(split=split) for folder in self.kind.images], name
        )
        positions = self.index.with_instances().tolist()
        if not positions:
            raise DataError(f"{self.source}: is empty; no image has an annotated part")
        files = [self._file(file) for file in self.index.file_names]
        self.positions = usable(self.index, positions, files, self.folder, options, self.dataset)

    @staticmethod
    def _folder(folders: list[Path], name: str) -> Path:
        there = [folder for folder in folders if folder.is_dir()]
        return there[0] if there else require_folder(folders[0], f"the images of {name}")

    def _file(self, name: str) -> str:
        """Where the image of that name is, under the folder of images."""
        if self.kind.by_synset and "/" not in name and not os.path.isfile(self.folder / name):
            return f"{name[:9]}/{name}"
        return name

    def _inside(self, name: str) -> Path:
        """Its path. COCO's folders of photos may be links; nothing else below the folder of images
        may lead out of it."""
        folder, _, rest = name.partition("/")
        return (
            resolve_inside(self.folder / folder, rest)
            if folder in self.kind.linked
            else resolve_inside(self.folder, name)
        )

    def __len__(self) -> int:
        return len(self.positions)

    def path(self, index: int) -> Path:
        """The image of sample ``index``."""
        return self.folder / self._file(self.index.file_names[int(self.positions[index])])

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image ``index`` with some of its categories in training, all of them otherwise; those
        without a pixel are left out.

        Raises DataError; in training NothingToAsk where no category has a pixel.
        """
        position = int(self.positions[index])
        record = self.index.image(position)
        path = self._inside(self._file(record["file_name"]))
        image = read_claimed(path, record, self.source)
        size = image.shape[:2]
        by_category: dict[int, list[dict]] = defaultdict(list)
        for entry in self.index.annotations(position):
            by_category[entry["category_id"]].append(entry)
        categories = sorted(by_category)
        if self.options.training:
            categories = [int(c) for c in rng.permutation(categories)]
        conversations: list[Conversation] = []
        for category in categories:
            if self.options.training and len(conversations) == self.options.num_classes_per_sample:
                break
            target, crowd = self._masks(by_category[category], size)
            if target.any():
                host = self._host(category, by_category, size)
                conversations.append(self._conversation(category, target, crowd, host, rng))
        if self.options.training and not conversations:
            raise NothingToAsk(f"{path}: no annotation in {self.source} has a pixel")
        return Sample(
            image,
            str(path),
            conversations,
            "semantic",
            self.dataset,
            Path(record["file_name"]).stem,
        )

    def _masks(self, entries: list[dict], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """(union of the instances, crowd regions beside it), each bool (H, W)."""
        target, crowd = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
        for entry in entries:
            field = f'annotation {entry["id"]} "segmentation"'
            mask = annotation_mask(entry["segmentation"], size, self.source, field, thin=True)
            union = crowd if entry.get("iscrowd") else target
            union |= mask
        return target, crowd & ~target

    def _host(
        self, category: int, by_category: dict[int, list[dict]], size: tuple[int, int]
    ) -> np.ndarray | None:
        """Every object of the kind that the part belongs to, bool (H, W), where the image's
        annotations hold it."""
        if self.names[category].part is None:
            return None
        objects = [
            e
            for c, entries in by_category.items()
            if self.names[c] == Name(self.names[category].thing)
            for e in entries
        ]
        host, _ = self._masks(objects, size)
        return host if host.any() else None

    def _conversation(
        self,
        category: int,
        target: np.ndarray,
        crowd: np.ndarray,
        host: np.ndarray | None,
        rng: np.random.Generator,
    ) -> Conversation:
        wording = self.options.wording(rng)
        question = phrase_question(self.names[category].phrase(wording), wording)
        reply = answer(self.options.levels, wording)
        hosts = None if host is None else host[None]
        return Conversation(
            [(question, reply)], target[None], crowd if crowd.any() else None, hosts
        )

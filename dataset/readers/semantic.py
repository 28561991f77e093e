"""Semantic segmentation from label maps: "the sky" is every pixel of that class.

::

    ade20k        <dataset_dir>/ade20k/{images,annotations}/{training,validation}/*.{jpg,png}
    cocostuff     <dataset_dir>/cocostuff/{train2017,val2017}/*.png ("stuffthingmaps") and coco/{train2017,val2017}/*.jpg
    mapillary     <dataset_dir>/mapillary/config_v2.0.json and mapillary/{training,validation}/{images,v2.0/labels}/*.{jpg,png}
    synthreason   <dataset_dir>/synth_sem/{images,annotations}/{train,val}/*.{jpg,png} and synth_sem/classes.json

What a pixel's value means:

============  =====  =============  =====================================================================================
set           void   class i        classes that are never asked and count as void
============  =====  =============  =====================================================================================
ade20k        0      i + 1
cocostuff     255    i              those with "-" in their name ("wall-brick", "food-other"): they overlap or name the rest
mapillary     255    i              those that its config does not evaluate ("Unlabeled")
synthreason          i + 1          0 is background, in no class
============  =====  =============  =====================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.conversation.turns import Conversation
from dataset.conversation.wordings import answer, phrase_question
from dataset.files.errors import DataError, MissingDataError, NothingToAsk
from dataset.files.images import IMAGE_SUFFIXES, check_size, probe_images, read_image, read_label
from dataset.files.packed import PackedRecords
from dataset.files.paths import list_files, require_folder
from dataset.files.text import read_json
from dataset.readers.coco import without_missing
from dataset.readers.exclusion import without_excluded
from dataset.sample import LoaderOptions, Sample

ADE20K_CLASSES = Path(__file__).with_name("ade20k_classes.json")
# The 182 names of COCO-Stuff's label list without its 0; "sky-other" is called "sky" as in LISA,
# which makes it a class to ask for.
COCOSTUFF_CLASSES = Path(__file__).with_name("cocostuff_classes.json")


@dataclass(frozen=True)
class Family:
    """Where the files of a data set lie, under the data folder, and how its label maps are to be
    read."""

    images: str
    """Folder of the images; {split} stands for the split."""
    labels: str
    """Folder of the label maps."""
    classes: str
    """JSON list of names, or Mapillary's config; relative to the data folder unless absolute."""
    train_split: str
    first: int
    """Value of class 0."""
    void: int | None
    """Value of unlabelled pixels, which could be anything and are ignored; None: unlabelled is
    background, in no class."""
    void_mark: str | None = None
    """Classes with this text in their name are void."""
    coco_images: bool = False
    """Images are COCO's: there may be more of them than label maps, and --exclude_val concerns
    them."""


FAMILIES = {
    "ade20k": Family(
        "ade20k/images/{split}",
        "ade20k/annotations/{split}",
        str(ADE20K_CLASSES),
        "training",
        first=1,
        void=0,
    ),
    "cocostuff": Family(
        "coco/{split}",
        "cocostuff/{split}",
        str(COCOSTUFF_CLASSES),
        "train2017",
        first=0,
        void=255,
        void_mark="-",
        coco_images=True,
    ),
    "mapillary": Family(
        "mapillary/{split}/images",
        "mapillary/{split}/v2.0/labels",
        "mapillary/config_v2.0.json",
        "training",
        first=0,
        void=255,
    ),
    "synthreason": Family(
        "synth_sem/images/{split}",
        "synth_sem/annotations/{split}",
        "synth_sem/classes.json",
        "train",
        first=1,
        void=None,
    ),
}


def read_classes(path: Path) -> tuple[list[str], set[int]]:
    """(names, indices of those that are not evaluated) of a JSON list or of a Mapillary config.
    Raises DataError."""
    content = read_json(path)
    if is_list := isinstance(content, list):
        labels = [{"readable": name} for name in content]
    else:
        labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, list) or not labels:
        raise DataError(
            f"{path}: must be a non-empty list of class names, or a Mapillary config with the list"
            ' "labels"'
        )
    names = [label.get("readable") if isinstance(label, dict) else None for label in labels]
    if any(not isinstance(name, str) or not name.strip() for name in names):
        raise DataError(
            f"{path}: must be a non-empty list of class names; those of a Mapillary config are"
            ' called "readable"'
        )
    silent = {i for i, label in enumerate(labels) if label.get("evaluate") is False}
    return names if is_list else [name.lower() for name in names], silent


class SemanticSegmentation:
    """A sample is an image with questions about some of its classes."""

    def __init__(
        self, dataset_dir: str | Path, name: str, options: LoaderOptions, split: str | None = None
    ):
        """``name``: a key of FAMILIES; ``split`` defaults to its training split. Raises
        DataError."""
        if name not in FAMILIES:
            raise ValueError(f"unknown semantic data set {name!r}; known: {', '.join(FAMILIES)}")
        self.family = FAMILIES[name]
        self.options = options
        split = split or self.family.train_split
        if Path(split).name != split or split == "..":
            raise ValueError(
                f"{name}|{split}: {split!r} is no split; give the name of a folder, such as"
                f" {self.family.train_split}"
            )
        self.dataset = f"{name}|{split}"
        root = Path(dataset_dir)
        require_folder(root / Path(self.family.labels).parts[0], f"the {name} data")
        self.classes, silent = read_classes(root / self.family.classes)
        mark = self.family.void_mark
        self.void_classes = silent | {
            i for i, c in enumerate(self.classes) if mark is not None and mark in c
        }
        self.image_folder = require_folder(
            root / self.family.images.format(split=split), f"the {name} images"
        )
        self.label_folder = require_folder(
            root / self.family.labels.format(split=split), f"the {name} label maps"
        )
        self.files = PackedRecords(
            self._shared_images() if self.family.coco_images else self._own_images()
        )
        if not len(self.files):
            raise DataError(
                f"{self.image_folder}: split {self.dataset} is empty; it needs .jpg files and label"
                " maps"
            )

    def _own_images(self) -> list[tuple[str, str]]:
        """(image, label map), names of files. Every image has a label map."""
        images = list_files(self.image_folder, IMAGE_SUFFIXES)
        there = {path.name for path in list_files(self.label_folder, (".png",))}
        pairs = []
        for path in images:
            with self.options.faults.guard(self.dataset, path):
                if not self.options.faults.skips(self.dataset, path):
                    if f"{path.stem}.png" not in there:
                        raise MissingDataError(
                            f"{path}: its label map {self.label_folder / path.stem}.png does not"
                            " exist"
                        )
                    probe_images([path])
                    pairs.append((path.name, f"{path.stem}.png"))
        return pairs

    def _shared_images(self) -> list[tuple[str, str]]:
        """The same where other data sets use the images, too. Every label map has an image; these
        are too many to look into."""
        labels = [path.name for path in list_files(self.label_folder, (".png",))]
        labels = without_excluded(labels, labels, self.options, self.dataset)
        images = [f"{Path(name).stem}.jpg" for name in labels]
        pairs = list(zip(images, labels, strict=True))
        return without_missing(
            pairs, images, self.image_folder, self.label_folder, self.options, self.dataset
        )

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """The image of sample ``index``."""
        return self.image_folder / self.files[index][0]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image ``index`` with some of its classes in training, all of them otherwise (none, where
        all are void).

        Raises DataError; in training NothingToAsk where all are void.
        """
        image_name, label_name = self.files[index]
        path, label_path = self.image_folder / image_name, self.label_folder / label_name
        label = read_label(label_path)
        image = read_image(path, label.shape)
        check_size(label.shape, image.shape, label_path, "the label map")
        found = self._found(label, label_path)
        if self.options.training:
            if not len(found):
                raise NothingToAsk(f"{label_path}: holds only classes that are not asked for")
            found = rng.choice(
                found, size=min(self.options.num_classes_per_sample, len(found)), replace=False
            )
        void = np.isin(label, self._void_values())
        conversations = [
            self._conversation(int(value), label, void if void.any() else None, rng)
            for value in found
        ]
        return Sample(image, str(path), conversations, "semantic", self.dataset, path.stem)

    def _void_values(self) -> list[int]:
        classes = [i + self.family.first for i in self.void_classes]
        return classes if self.family.void is None else [*classes, self.family.void]

    def _found(self, label: np.ndarray, path: Path) -> np.ndarray:
        """The values of the classes to ask for, in ascending order. Raises DataError for a value
        that is none."""
        values = np.unique(label)
        last = self.family.first + len(self.classes) - 1
        if len(unknown := values[(values > last) & (values != self.family.void)]):
            raise DataError(
                f"{path}: holds the value {unknown[-1]}, but there are only {len(self.classes)}"
                " classes"
            )
        classes = values[(values >= self.family.first) & (values != self.family.void)]
        # a photo may show nothing but void, a drawn scene is of something
        if not len(classes) and self.family.void is None:
            raise DataError(f"{path}: holds no class at all; remove this pair")
        return classes[~np.isin(classes, self._void_values())]

    def _conversation(
        self, value: int, label: np.ndarray, void: np.ndarray | None, rng: np.random.Generator
    ) -> Conversation:
        question = phrase_question(
            f"the {self.classes[value - self.family.first]}", self.options.wording(rng)
        )
        reply = answer(self.options.levels, self.options.wording(rng))
        return Conversation([(question, reply)], (label == value)[None], void)

"""Semantic segmentation from label maps: "the sky" is every pixel of that class.

::

    ade20k        <dataset_dir>/ade20k/{images,annotations}/{training,validation}/*.{jpg,png}
    cocostuff     <dataset_dir>/cocostuff/{train2017,val2017}/*.png ("stuffthingmaps")
                  <dataset_dir>/coco/{train2017,val2017}/*.jpg
    mapillary     <dataset_dir>/mapillary/config_v2.0.json
                  <dataset_dir>/mapillary/{training,validation}/{images,v2.0/labels}/*.{jpg,png}
    synthreason   <dataset_dir>/synth_sem/classes.json
                  <dataset_dir>/synth_sem/{images,annotations}/{train,val}/*.{jpg,png}

What a pixel's value means:

============  =====  ========  ==================================================================
set           void   class i   classes that are never asked for and count as void
============  =====  ========  ==================================================================
ade20k        0      i + 1     none
cocostuff     255    i         those with "-" in their name, which overlap others ("wall-brick")
                               or name the rest ("food-other")
mapillary     255    i         those that its config does not evaluate ("Unlabeled")
synthreason   none   i + 1     none; 0 is background, which is in no class
============  =====  ========  ==================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np

from cores.dataset.files.errors import DataError, MissingDataError, NothingToAsk
from cores.dataset.files.images import (
    IMAGE_SUFFIXES,
    check_size,
    probe_images,
    read_image,
    read_label,
)
from cores.dataset.files.lookup import Identities, Lookup
from cores.dataset.files.packed import PackedRecords
from cores.dataset.files.paths import list_files, require_folder
from cores.dataset.files.text import read_json
from cores.dataset.readers.questions import phrase_conversation
from cores.dataset.readers.usable import without_excluded, without_missing
from cores.dataset.sample import LoaderOptions, Sample

ADE20K_CLASSES = Path(__file__).with_name("ade20k_classes.json")
# The 182 names of COCO-Stuff's label list without its 0. "sky-other" is called "sky", as in LISA:
# without the "-" it is a class that may be asked for.
COCOSTUFF_CLASSES = Path(__file__).with_name("cocostuff_classes.json")


@dataclass(frozen=True)
class LabelMapSource:
    """Where the files of a data set lie, under the data folder, and how its label maps are read.
    {split} stands for the split."""

    images: str
    """Folder of the images."""
    labels: str
    """Folder of the label maps."""
    classes: str
    """JSON list of names, or Mapillary's config; relative to the data folder unless absolute."""
    train_split: str
    first: int
    """Value of class 0."""
    void: int | None
    """Value of unlabelled pixels, which are ignored because they may be of any class; None where
    unlabelled pixels are background, which is in no class."""
    void_mark: str | None = None
    """Classes with this text in their name are void."""
    coco_images: bool = False
    """Whether the images are COCO's: then there may be more of them than label maps, and
    --exclude_val applies."""


LABEL_MAPS = {
    "ade20k": LabelMapSource(
        images="ade20k/images/{split}",
        labels="ade20k/annotations/{split}",
        classes=str(ADE20K_CLASSES),
        train_split="training",
        first=1,
        void=0,
    ),
    "cocostuff": LabelMapSource(
        images="coco/{split}",
        labels="cocostuff/{split}",
        classes=str(COCOSTUFF_CLASSES),
        train_split="train2017",
        first=0,
        void=255,
        void_mark="-",
        coco_images=True,
    ),
    "mapillary": LabelMapSource(
        images="mapillary/{split}/images",
        labels="mapillary/{split}/v2.0/labels",
        classes="mapillary/config_v2.0.json",
        train_split="training",
        first=0,
        void=255,
    ),
    "synthreason": LabelMapSource(
        images="synth_sem/images/{split}",
        labels="synth_sem/annotations/{split}",
        classes="synth_sem/classes.json",
        train_split="train",
        first=1,
        void=None,
    ),
}


def read_classes(path: Path) -> tuple[list[str], set[int]]:
    """(names, indices of those that are not evaluated) of a JSON list or of a Mapillary config,
    whose names become lower case. Raises DataError."""
    content = read_json(path)
    is_config = isinstance(content, dict)
    labels = content.get("labels") if is_config else content
    if not isinstance(labels, list) or not labels:
        raise DataError(
            f"{path}: must be a non-empty list of class names, or a Mapillary config with the list"
            ' "labels"'
        )
    names = labels
    if is_config:
        names = [label.get("readable") if isinstance(label, dict) else None for label in labels]
    if any(not isinstance(name, str) or not name.strip() for name in names):
        raise DataError(
            f"{path}: must be a non-empty list of class names; those of a Mapillary config are"
            ' called "readable"'
        )
    if not is_config:
        return names, set()
    unevaluated = {i for i, label in enumerate(labels) if label.get("evaluate") is False}
    return [name.lower() for name in names], unevaluated


class SemanticSegmentation:
    """A sample is an image with questions about some of its classes."""

    def __init__(
        self, dataset_dir: str | Path, name: str, options: LoaderOptions, split: str | None = None
    ):
        """``name``: a key of LABEL_MAPS; ``split`` defaults to its training split. Raises
        DataError."""
        if name not in LABEL_MAPS:
            raise ValueError(f"unknown semantic data set {name!r}; known: {', '.join(LABEL_MAPS)}")
        self.kind = LABEL_MAPS[name]
        self.options = options
        split = split or self.kind.train_split
        if Path(split).name != split or split == "..":
            raise ValueError(
                f"{name}|{split}: {split!r} is no split; give the name of a folder, such as"
                f" {self.kind.train_split}"
            )
        self.dataset = f"{name}|{split}"
        root = Path(dataset_dir)
        require_folder(root / Path(self.kind.labels).parts[0], f"the {name} data")
        self.classes, void_classes = read_classes(root / self.kind.classes)
        if mark := self.kind.void_mark:
            void_classes |= {i for i, c in enumerate(self.classes) if mark in c}
        self.void_values = [i + self.kind.first for i in void_classes]
        if self.kind.void is not None:
            self.void_values.append(self.kind.void)
        self.image_folder = require_folder(
            root / self.kind.images.format(split=split), f"the {name} images"
        )
        self.label_folder = require_folder(
            root / self.kind.labels.format(split=split), f"the {name} label maps"
        )
        self.photos = Lookup([self.image_folder], options.follow_links)
        pairs = self._coco_pairs() if self.kind.coco_images else self._pairs()
        self.files, self.identities = PackedRecords(pairs), Identities(map(itemgetter(0), pairs))
        if not len(self.files):
            raise DataError(
                f"{self.image_folder}: split {self.dataset} is empty; it needs .jpg files and label"
                " maps"
            )

    def _pairs(self) -> list[tuple[str, str]]:
        """The file names (image, label map) of every image. Raises DataError for an image that is
        broken or has no label map."""
        links = self.options.follow_links
        labels = {path.stem: path for path in list_files(self.label_folder, (".png",), links)}
        pairs = []
        for path in list_files(self.image_folder, IMAGE_SUFFIXES, links):
            if self.options.faults.skips(self.dataset, path):
                continue
            label = labels.get(path.stem, self.label_folder / f"{path.stem}.png")
            with self.options.faults.guard(self.dataset, path):
                if path.stem not in labels:
                    raise MissingDataError(f"{path}: its label map {label} does not exist")
                probe_images([path])
                pairs.append((path.name, label.name))
        return pairs

    def _coco_pairs(self) -> Sequence[tuple[str, str]]:
        """The same for COCO's photos, of which not every one has a label map. They are too many to
        be opened here. Raises DataError for a label map without a photo."""
        labels = list_files(self.label_folder, (".png",), self.options.follow_links)
        pairs: Sequence[tuple[str, str]] = [(f"{path.stem}.jpg", path.name) for path in labels]
        image_of, options = itemgetter(0), self.options
        pairs = without_excluded(pairs, image_of, options, self.dataset)
        return without_missing(
            pairs, image_of, self.photos, self.label_folder, options, self.dataset
        )

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """The image of sample ``index``."""
        return self.photos.item(self.files[index][0])

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image ``index`` with some of its classes in training, all of them otherwise (none, where
        all are void).

        Raises DataError; in training NothingToAsk where all are void.
        """
        image_name, label_name = self.files[index]
        path, label_path = self.photos.item(image_name), self.label_folder / label_name
        label = read_label(label_path)
        image = read_image(path, [label.shape])
        check_size(label.shape, image.shape, label_path, "the label map")
        values = self._values_to_ask(label, label_path)
        if self.options.training:
            if not len(values):
                raise NothingToAsk(f"{label_path}: holds only classes that are not asked for")
            count = min(self.options.num_classes_per_sample, len(values))
            values = rng.choice(values, size=count, replace=False)
        void = np.isin(label, self.void_values)
        conversations = []
        for value in values.tolist():
            phrase = f"the {self.classes[value - self.kind.first]}"
            conversations.append(
                phrase_conversation(phrase, label == value, self.options, rng, void)
            )
        name = self.identities.of(image_name)
        return Sample(image, str(path), conversations, "semantic", self.dataset, name)

    def _values_to_ask(self, label: np.ndarray, path: Path) -> np.ndarray:
        """The values of the classes to ask for, in ascending order. Raises DataError for a value
        that is none."""
        values = np.unique(label)
        last = self.kind.first + len(self.classes) - 1
        if len(unknown := values[(values > last) & (values != self.kind.void)]):
            raise DataError(
                f"{path}: holds the value {unknown[-1]}, but there are only {len(self.classes)}"
                " classes"
            )
        classes = values[(values >= self.kind.first) & (values != self.kind.void)]
        # A photo may show nothing but void; a drawn scene without any class is a mistake.
        if not len(classes) and self.kind.void is None:
            raise DataError(f"{path}: holds no class at all; remove this pair")
        return classes[~np.isin(classes, self.void_values)]

"""Semantic segmentation from label maps: "the sky" is every pixel of that class.

::

    ade20k        <dataset_dir>/ade20k/{images,annotations}/{training,validation}/*.{jpg,png}
    synthreason   <dataset_dir>/synth_sem/{images,annotations}/{train,val}/*.{jpg,png} and synth_sem/classes.json

In both the PNG holds 0 for "no class" and i + 1 for class i.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.conversation import answer, phrase_question
from dataset.images import (
    IMAGE_SUFFIXES,
    DataError,
    MissingDataError,
    check_size,
    list_files,
    probe_images,
    read_image,
    read_json,
    read_label,
    require_folder,
    resolve_inside,
)
from dataset.sample import Conversation, LoaderOptions, Sample

ADE20K_CLASSES = Path(__file__).with_name("ade20k_classes.json")


@dataclass(frozen=True)
class Family:
    """Where the files of a data set lie. ``classes``: JSON list of names, relative to ``folder`` unless absolute."""

    folder: str
    classes: str
    train_split: str
    zero_is_void: bool
    """True: 0 is unlabelled and could be anything, so it is ignored; False: it is background, in no class."""


FAMILIES = {
    "ade20k": Family("ade20k", str(ADE20K_CLASSES), "training", zero_is_void=True),
    "synthreason": Family("synth_sem", "classes.json", "train", zero_is_void=False),
}


class SemanticSegmentation:
    """A sample is an image with questions about some of its classes."""

    def __init__(self, dataset_dir: str | Path, name: str, options: LoaderOptions, split: str | None = None):
        """``name``: a key of FAMILIES; ``split`` defaults to its training split. Raises DataError."""
        if name not in FAMILIES:
            raise ValueError(f"unknown semantic data set {name!r}; known: {', '.join(FAMILIES)}")
        self.family = FAMILIES[name]
        self.options = options
        split = split or self.family.train_split
        self.dataset = f"{name}|{split}"
        root = require_folder(Path(dataset_dir) / self.family.folder, f"the {name} data")
        self.classes = self._read_classes(root / self.family.classes)
        images = require_folder(resolve_inside(root / "images", split), f"the {name} images")
        labels = require_folder(resolve_inside(root / "annotations", split), f"the {name} label maps")
        self.images = list_files(images, IMAGE_SUFFIXES)
        if not self.images:
            raise DataError(f"{images}: split {self.dataset} is empty; it needs .jpg files")
        there = {path.name for path in list_files(labels, (".png",))}
        for path in self.images:
            if f"{path.stem}.png" not in there:
                raise MissingDataError(f"{path}: its label map {labels / path.stem}.png does not exist")
        self.labels = [labels / f"{path.stem}.png" for path in self.images]
        probe_images(self.images)

    @staticmethod
    def _read_classes(path: Path) -> list[str]:
        classes = read_json(path)
        if not isinstance(classes, list) or not classes or any(not isinstance(c, str) or not c.strip() for c in classes):
            raise DataError(f"{path}: must be a non-empty list of class names")
        return classes

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image ``index`` with some of its classes in training, all of them otherwise."""
        path, label_path = self.images[index], self.labels[index]
        image, label = read_image(path), read_label(label_path)
        check_size(label.shape, image.shape, label_path, "the label map")
        values = np.unique(label)
        if values[-1] > len(self.classes):
            raise DataError(f"{label_path}: holds the value {values[-1]}, but there are only {len(self.classes)} classes")
        values = values[values > 0]
        if not len(values):
            raise DataError(f"{label_path}: holds no class at all; remove this pair")
        if self.options.training:
            values = rng.choice(values, size=min(self.options.num_classes_per_sample, len(values)), replace=False)
        void = label == 0 if self.family.zero_is_void and (label == 0).any() else None
        conversations = [self._conversation(int(value), label, void, rng) for value in values]
        return Sample(image, str(path), conversations, "semantic", self.dataset, path.stem)

    def _conversation(self, value: int, label: np.ndarray, void: np.ndarray | None, rng: np.random.Generator) -> Conversation:
        question = phrase_question(f"the {self.classes[value - 1]}", self.options.wording(rng))
        reply = answer(self.options.levels, self.options.wording(rng))
        return Conversation([(question, reply)], (label == value)[None], void)

"""Referring segmentation: refCOCO, refCOCO+, refCOCOg, refCLEF and gRefCOCO. "The man on the left"
means one man among several.

::

    <dataset_dir>/refer_seg/<set>/refs(<splitBy>).p           gRefCOCO: grefs(<splitBy>).json or .p
    <dataset_dir>/refer_seg/<set>/instances.json              all annotations, in COCO's format
    <dataset_dir>/refer_seg/images/mscoco/images/train2014/   refCLEF: images/saiapr_tc-12/

A file of references is a list of ``{ref_id, image_id, ann_id, split, sentences: [{sent, …}], …}``.
The readers that come with the data (REFER, gRefer) read it like this:

- ``ann_id`` is one annotation. In gRefCOCO it is a list, whose union is the target, or [-1] where
  the sentence means nothing in the image: the target is empty.
- A segmentation is several polygons or (refCLEF) a list of run lengths. It may be empty: so is the
  target.
- Of the several annotations of a gRefCOCO reference, crowd regions are left out.
- refCLEF writes several test splits into one word: a reference of "testAC" belongs to testA and to
  testC. "test" stands for all of them.
- ``splitBy`` names who divided the data: unc, or for refCOCOg umd (by image) or google (by object,
  so that train and val share images).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cores.dataset.annotations.masks import annotation_mask
from cores.dataset.files.errors import DataError, MissingDataError, NothingToAsk
from cores.dataset.files.faults import Faults
from cores.dataset.files.images import claimed_size, read_claimed
from cores.dataset.files.index import CocoIndex
from cores.dataset.files.lookup import Identities, Lookup
from cores.dataset.files.packed import PackedRecords
from cores.dataset.files.paths import require_folder
from cores.dataset.files.refs_pickle import read_pickle
from cores.dataset.files.text import read_json
from cores.dataset.readers.questions import choose_wordings, phrase_conversation
from cores.dataset.readers.usable import usable_positions
from cores.dataset.sample import LoaderOptions, Sample

COCO_IMAGES = "images/mscoco/images/train2014"
NOTHING = -1  # gRefCOCO's ann_id where a sentence means nothing in the image


@dataclass(frozen=True)
class ReferringSet:
    """``images``: under refer_seg; ``split_by``: the division that training uses."""

    images: str = COCO_IMAGES
    split_by: str = "unc"


SETS = {
    "refclef": ReferringSet(images="images/saiapr_tc-12"),
    "refcoco": ReferringSet(),
    "refcoco+": ReferringSet(),
    "refcocog": ReferringSet(split_by="umd"),
    "grefcoco": ReferringSet(),
}
# All three divisions are by image. refCOCOg's other division is by object, so that leaving out its
# validation images would take most of its training images along.
VALIDATED = (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd"))


class Reference(NamedTuple):
    """One object, or in gRefCOCO any number of them, with the sentences that refer to it."""

    image_id: int
    annotations: list[int]
    """The ids of the objects; none where the sentences mean nothing in the image."""
    split: str
    sentences: list[str]
    number: int
    """Its place in the file."""


def _files(folder: Path) -> dict[str, Path]:
    """splitBy -> file of references, for all divisions that are there; .json counts before .p."""
    prefix = "grefs" if folder.name == "grefcoco" else "refs"
    found = (path for end in (".p", ".json") for path in sorted(folder.glob(f"{prefix}(*){end}")))
    return {path.stem[len(prefix) + 1 : -1]: path for path in found}


def read_references(
    folder: Path, split_by: str, faults: Faults | None = None, dataset: str = ""
) -> list[Reference]:
    """All references in the folder of a set. ``faults``: what to do about bad ones (default: raise
    the first).

    Raises DataError; one that is MissingDataError lists the divisions that are there.
    """
    faults = faults or Faults()
    files = _files(require_folder(folder, "a referring data set"))
    if split_by not in files:
        raise MissingDataError(
            f"{folder}: has no references divided by {split_by!r}; there are:"
            f" {', '.join(files) or 'none'}"
        )
    path = files[split_by]
    entries = read_json(path) if path.suffix == ".json" else read_pickle(path)
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: must be a non-empty list of references")
    found, bad = [], []
    for number, entry in enumerate(entries):
        try:
            found.append(_reference(entry, number))
        except DataError as error:
            bad.append((f"{path}:reference {number}", f"{path}: {error}"))
    faults.leave_out(dataset, bad)
    return found


def _reference(entry: Any, number: int) -> Reference:
    where = f"reference {number}"
    if not isinstance(entry, dict):
        raise DataError(f"{where} is not an object")
    ids = entry.get("ann_id")
    ids = ids if isinstance(ids, list) else [ids]
    if type(entry.get("image_id")) is not int or not ids or any(type(i) is not int for i in ids):
        raise DataError(
            f'{where}: "image_id" and "ann_id" must be whole numbers (gRefCOCO: a list of them)'
        )
    if not isinstance(entry.get("split"), str):
        raise DataError(f'{where}: "split" must be a text')
    sentences = entry.get("sentences")
    if not isinstance(sentences, list) or any(
        not isinstance(s, dict) or not isinstance(s.get("sent"), str) for s in sentences
    ):
        raise DataError(f'{where}: "sentences" must be a list of {{"sent": text, …}}')
    texts = [text for s in sentences if (text := s["sent"].strip())]
    annotations = [i for i in ids if i != NOTHING]
    return Reference(entry["image_id"], annotations, entry["split"], texts, number)


def _belongs(split: str, wanted: str) -> bool:
    if wanted in ("testA", "testB", "testC"):
        return split.startswith("test") and wanted[-1] in split
    return split.startswith("test") if wanted == "test" else split == wanted


def validation_images(dataset_dir: str | Path) -> frozenset[int]:
    """COCO's numbers of the photos in the val and test splits of refCOCO, refCOCO+ and refCOCOg,
    for --exclude_val.

    Raises MissingDataError if the references of one of them are not there, DataError if they are
    broken.
    """
    root = Path(dataset_dir) / "refer_seg"
    found = set()
    for name, split_by in VALIDATED:
        try:
            references = read_references(root / name, split_by)
        except MissingDataError as error:
            raise MissingDataError(
                f"--exclude_val needs the references of {name}, {split_by}: {error}"
            ) from None
        found |= {r.image_id for r in references if r.split == "val" or _belongs(r.split, "test")}
    return frozenset(found)


class ReferringSegmentation:
    """A sample is an image with sentences that mean something in it."""

    def __init__(self, dataset_dir: str | Path, spec: str, options: LoaderOptions):
        """``spec``: "refcoco|unc|val"; in training also "refcocog" or "refcocog|google", which is
        its train split.

        Raises ValueError or DataError listing the sets, divisions or splits that there are.
        """
        # The published evaluation scores every sentence of every reference.
        self.options = replace(options, texts="all")
        name, split_by, split = self._read_spec(spec, options.training)
        self.dataset = f"{name}|{split_by}|{split}"
        root = require_folder(Path(dataset_dir) / "refer_seg", "the referring data sets")
        folder = require_folder(root / SETS[name].images, f"the images of {name}")
        self.photos = Lookup([folder], options.follow_links)
        self.source = root / name / "instances.json"
        references = read_references(root / name, split_by, options.faults, self.dataset)
        self.index = CocoIndex.open(self.source, tolerant=options.faults.leaves_out)
        chosen = [r for r in references if _belongs(r.split, split)]
        if not chosen:
            known = ", ".join(sorted({r.split for r in references}))
            raise MissingDataError(
                f"{root / name}: no split {split!r} in the division {split_by!r}; there are:"
                f" {known}"
            )
        self.records = self._by_image(chosen, _files(root / name)[split_by])

    @staticmethod
    def _read_spec(spec: str, training: bool) -> tuple[str, str, str]:
        name, *rest = spec.split("|")
        if name not in SETS:
            raise ValueError(f"unknown referring data set {name!r}; known: {', '.join(SETS)}")
        if training:  # Only the set must be named.
            rest += (SETS[name].split_by, "train")[len(rest) :]
        if len(rest) != 2 or not all(rest):
            raise ValueError(
                f'{spec!r}: write it as "{name}|{SETS[name].split_by}|val", the set, who divided it'
                " and the split"
            )
        return name, rest[0], rest[1]

    def _by_image(self, references: list[Reference], file: Path) -> PackedRecords:
        """One record per image, in the order of file names: [position in the index, [[annotation
        ids, sentences], …]]. Raises DataError."""
        by_image: dict[int, list] = defaultdict(list)
        bad: list[tuple[str, str]] = []
        damaged = {entry.image for entry in self.index.bad}
        known = set(self.index.annotation_ids.tolist())
        for reference in references:
            item, where = f"{file}:reference {reference.number}", f"{self.source}: lacks the"
            called = f"reference {reference.number} of {self.dataset}"
            try:
                position = self.index.image_position(reference.image_id)
            except KeyError:
                bad.append((item, f"{where} image {reference.image_id} of {called}"))
                continue
            unknown = [number for number in reference.annotations if number not in known]
            # A reference to a bad annotation is not bad itself: it is left out with its image.
            if unknown and self.index.file_names[position] not in damaged:
                bad.append((item, f"{where} annotation {unknown[0]}, which {called} means"))
            elif reference.sentences:
                by_image[position].append([reference.annotations, reference.sentences])
        self.options.faults.leave_out(self.dataset, bad)
        if not by_image:
            raise DataError(
                f"{self.source.parent}: the references of {self.dataset} have no sentences"
            )
        name_of = self.index.file_names.__getitem__
        positions = usable_positions(
            self.index, sorted(by_image), name_of, self.photos, self.options, self.dataset
        )
        self.identities = Identities(map(name_of, positions.tolist()))
        return PackedRecords([position, by_image[position]] for position in positions.tolist())

    def __len__(self) -> int:
        return len(self.records)

    def path(self, index: int) -> Path:
        """The image of sample ``index``."""
        return self.photos.item(self.index.file_names[self.records[index][0]])

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image ``index`` with some of its sentences in training, all of them otherwise; those
        whose objects were drawn without covering a pixel are not asked."""
        position, references = self.records[index]
        entry = self.index.image(position)
        path = self.photos.find(entry["file_name"])
        image = read_claimed(path, claimed_size(entry, self.source), self.source)
        size = image.shape[:2]
        chosen = choose_wordings([texts for _, texts in references], self.options, rng)
        masks = {number: self._mask(references[number][0], size) for number, _ in chosen}
        conversations = []
        for number, text in chosen:
            if not masks[number].any() and any(map(self._is_drawn, references[number][0])):
                self.options.faults.remark(
                    self.dataset, f"{path}: {text!r} covers no pixel and is not asked"
                )
                continue
            conversations.append(
                phrase_conversation(text.lower(), masks[number], self.options, rng)
            )
        if self.options.training and not conversations:
            raise NothingToAsk(f"{path}: no reference that was drawn has a pixel")
        name = self.identities.of(entry["file_name"])
        return Sample(image, str(path), conversations, "referring", self.dataset, name)

    def _is_drawn(self, annotation: int) -> bool:
        """Whether an annotation, given by id, has a segmentation; an empty one means nothing."""
        return bool(self.index.annotation(annotation)["segmentation"])

    def _mask(self, annotations: list[int], size: tuple[int, int]) -> np.ndarray:
        """The union of annotations, given by id, as bool (H, W)."""
        mask = np.zeros(size, dtype=bool)
        for number in annotations:
            entry = self.index.annotation(number)
            if len(annotations) == 1 or not entry.get("iscrowd"):
                field = f'annotation {number} "segmentation"'
                mask |= annotation_mask(entry["segmentation"], size, self.source, field)
        return mask

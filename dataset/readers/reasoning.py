"""ReasonSeg and every data set in its layout (SynthReason, your own).

::

    <dataset_dir>/reason_seg/<Name>/{train,val,test}/*.{jpg,json}
    <dataset_dir>/reason_seg/<Name>/explanatory/train.json          optional

A JSON holds one query about one image::

    text         one or several wordings of the query
    is_sentence  true: a long query (a sentence); false: a short one (a phrase)
    shapes       as labelme writes them: label, points [[x, y], …] and shape_type (default:
                 "polygon"); the label "flag" is skipped, one with "ignore" in it marks pixels that
                 do not count, every other one is the target

Optional fields, which ReasonSeg does not have and its other readers ignore::

    image        name of the image in the same folder, which JSONs may share (default: the JSON's
                 own name with the ending of a photo)
    target_rle   the exact target, as COCO run-length {"size": [H, W], "counts": …}, instead of its
                 polygons
    host_shapes  polygons of the object that holds the target; or host_rle, its exact mask
    imageHeight  with imageWidth, the size of the image that was annotated

The JSONs of one image become one sample with several conversations.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np

from cores.dataset.annotations.masks import kind_of_label, paint_shapes
from cores.dataset.annotations.shapes import hint_of_inline, kind_of, outline
from cores.dataset.conversation.turns import Conversation
from cores.dataset.conversation.wordings import answer, is_sentence
from cores.dataset.files.errors import DataError, MissingDataError
from cores.dataset.files.faults import Together
from cores.dataset.files.images import IMAGE_SUFFIXES, check_claim, claimed_size, read_image
from cores.dataset.files.lookup import Identities, Lookup
from cores.dataset.files.paths import list_files, list_folders, named_inside, require_folder
from cores.dataset.files.rle import decode_rle
from cores.dataset.files.text import read_json
from cores.dataset.readers.questions import as_wordings, choose_wordings, word_question
from cores.dataset.readers.usable import is_readable, without_excluded
from cores.dataset.sample import LoaderOptions, Sample


def _check_shapes(record: dict, field: str, path: Path) -> None:
    shapes = record[field]
    if not isinstance(shapes, list):
        raise DataError(f'{path}: "{field}" must be a list of {{"label": …, "points": …}}')
    for index, shape in enumerate(shapes):
        where = f'{path}: "{field}"[{index}]'
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise DataError(f'{where} has no text "label"')
        if kind_of_label(shape["label"]) != "flag":
            outline(shape, where)


def _is_line(shape: dict) -> bool:
    """Whether a shape that was checked is a polygon that encloses nothing."""
    is_flag = kind_of_label(shape["label"]) == "flag"
    return not is_flag and kind_of(shape, "") == "polygon" and len(shape["points"]) < 3


def read_record(path: Path) -> dict:
    """The content of one query's JSON with its fields checked; "text" is always a list. Raises
    DataError naming file and field."""
    record = read_json(path)
    if not isinstance(record, dict) or "shapes" not in record:
        raise DataError(f'{path}: has no "shapes"; a ReasonSeg JSON needs "shapes" and "text"')
    _check_shapes(record, "shapes", path)
    if "host_shapes" in record:
        _check_shapes(record, "host_shapes", path)
    texts = as_wordings(record.get("text"))
    if not texts:
        raise DataError(f'{path}: "text" must be a list of at least one non-empty query')
    if not isinstance(record.get("is_sentence"), (bool, type(None))):
        raise DataError(f'{path}: "is_sentence" must be true or false')
    if not isinstance(record.get("image", ""), str):
        raise DataError(f'{path}: "image" must be a file name')
    stated_size(record, path)
    return record | {"text": texts}


def stated_size(record: dict, path: Path) -> tuple[int, int] | None:
    """The (H, W) of the image that a JSON was drawn on, as labelme notes it. Raises DataError."""
    return claimed_size(record, path, "imageHeight", "imageWidth")


def record_masks(
    record: dict, size: tuple[int, int], path: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(target, ignore, host or None) of a query, each bool (H, W) for an image of that ``size``.
    Raises DataError."""
    target, ignore = paint_shapes(record["shapes"], size, f'{path}: "shapes"')
    if "target_rle" in record:
        target = decode_rle(record["target_rle"], size, path, "target_rle")
        ignore &= ~target
    host = None
    if "host_rle" in record:
        host = decode_rle(record["host_rle"], size, path, "host_rle")
    elif "host_shapes" in record:
        shapes, field = record["host_shapes"], f'{path}: "host_shapes"'
        host, _ = paint_shapes(shapes, size, field)
    return target, ignore, host


@dataclass(frozen=True)
class ReasoningQuery:
    """One JSON without its masks, which are read again when they are needed."""

    path: Path
    texts: tuple[str, ...]
    is_sentence: bool | None
    explanations: tuple[str, ...]
    size: tuple[int, int] | None
    """(H, W) that the JSON claims for its image."""


class ReasoningSegmentation:
    """One or several splits of a data set in ReasonSeg's layout; a sample is an image with its
    queries."""

    def __init__(self, dataset_dir: str | Path, spec: str, options: LoaderOptions):
        """``spec``: "ReasonSeg|train", several splits as "ReasonSeg|train|val", or
        "ReasonSeg|testshort" or "|testlong" for queries of one length. All JSONs and both ends of
        all images are checked here. Raises DataError."""
        self.dataset = spec
        self.options = options
        name, *splits = spec.split("|")
        if not splits or not all(splits):
            raise ValueError(f'{spec!r} names no split; write it as "{name or "ReasonSeg"}|train"')
        root = require_folder(
            Path(dataset_dir) / "reason_seg", "the folder of ReasonSeg-like data sets"
        )
        self.root = named_inside(root, name)
        if not self.root.is_dir():
            known = ", ".join(folder.name for folder in list_folders(root)) or "none"
            raise MissingDataError(f"{self.root}: no such data set; {root} holds: {known}")
        explanations = self._read_explanations()
        groups: dict[Path, list[ReasoningQuery]] = defaultdict(list)
        for split in splits:
            self._read_split(split, explanations, groups)
        readable = [path for path in sorted(groups) if is_readable(path, options.faults, spec)]
        if not readable:
            raise DataError(f"{self.root}: no image of {spec} can be used")
        self.images = without_excluded(readable, attrgetter("name"), options, spec)
        self.queries = [groups[path] for path in self.images]
        self.identities = Identities([path.relative_to(self.root).as_posix() for path in readable])

    def _read_explanations(self) -> dict[str, list[str]]:
        """JSON name -> its explanations; empty unless they are wanted and there."""
        path = self.root / "explanatory" / "train.json"
        if not self.options.training or self.options.explanatory <= 0 or not path.exists():
            return {}
        entries = read_json(path)
        found: dict[str, list[str]] = defaultdict(list)
        bad: list[tuple[str, str]] = []
        for index, entry in enumerate(entries if isinstance(entries, list) else [None]):
            fields = entry if isinstance(entry, dict) else {}
            if all(isinstance(fields.get(key), str) for key in ("json", "outputs")):
                found[fields["json"]].append(fields["outputs"])
            else:
                reason = f'{path}: entry {index} needs the texts "json" and "outputs"'
                bad.append((f"{path}:entry {index}", reason))
        self.options.faults.leave_out(self.dataset, bad)
        return found

    def _folder(self, split: str) -> tuple[Path, bool | None]:
        """The folder of "test", "testshort" or "testlong", and which ``is_sentence`` its queries
        must have (None: any)."""
        folder = named_inside(self.root, split)
        if not folder.is_dir() and (length := re.fullmatch(r"(.+)(short|long)", split)):
            folder = named_inside(self.root, length[1])
            if folder.is_dir():
                return folder, length[2] == "long"
        if not folder.is_dir():
            known = [p.name for p in list_folders(self.root) if p.name != "explanatory"]
            raise MissingDataError(
                f"{folder}: no such split of {self.root.name}; there are:"
                f" {', '.join(known) or 'none'}"
            )
        return folder, None

    def _read_split(
        self,
        split: str,
        explanations: dict[str, list[str]],
        groups: dict[Path, list[ReasoningQuery]],
    ) -> None:
        """Adds the queries of a split to ``groups``, under their images."""
        folder, wanted = self._folder(split)
        links = self.options.follow_links
        images, photos = list_files(folder, IMAGE_SUFFIXES, links), Lookup([folder], links)
        used: set[Path] = set()
        read, found, faults = 0, False, self.options.faults
        paths = list_files(folder, (".json",), links)
        for inner in list_folders(folder):
            if count := len(list_files(inner, (".json",), links)):
                faults.remark(
                    self.dataset,
                    f"{inner}: {count} JSONs in a folder of their own are not read; move them up",
                )
        for path in paths:
            if faults.skips(self.dataset, path):
                continue
            with faults.guard(self.dataset, path):
                record = read_record(path)
                name = record.get("image")
                try:
                    image = photos.find(name or path.stem)
                except MissingDataError as error:
                    shown = name or f"{path.stem}.jpg"
                    reason = "" if " is not there" in str(error) else f" ({error})"
                    raise MissingDataError(
                        f"{path}: its image {shown} is not in {folder}{reason}; restore it or"
                        f" remove the JSON{hint_of_inline(record)}"
                    ) from None
                except DataError as error:
                    raise DataError(f"{path}: {error}") from None
                if any(map(_is_line, record["shapes"])):
                    line = f"{path}: a polygon of two points is drawn as a line, as published"
                    faults.remark(self.dataset, line)
                used.add(image)
                read += 1
                is_sentence = record.get("is_sentence")
                if wanted is not None and is_sentence is None:
                    raise DataError(
                        f'{path}: has no "is_sentence", which {self.dataset} needs to tell short'
                        " from long"
                    )
                if wanted in (None, is_sentence):
                    found = True
                    texts, reasons = tuple(record["text"]), tuple(explanations.get(path.name, ()))
                    size = stated_size(record, path)
                    query = ReasoningQuery(path, texts, is_sentence, reasons, size)
                    groups[image].append(query)
        # If a JSON was skipped we cannot tell which image was its own, so report unused images only
        # when all JSONs were read.
        for image in sorted(set(images) - used) if read == len(paths) else ():
            if not faults.skips(self.dataset, image):
                with faults.guard(self.dataset, image):
                    raise MissingDataError(
                        f"{image}: no JSON belongs to this image; restore it or remove the image"
                    )
        if not paths:
            raise DataError(
                f"{folder}: split {self.dataset} is empty; it needs .jpg files with .json beside"
                " them"
            )
        if not read:
            raise DataError(f"{folder}: no JSON of {self.dataset} can be used")
        if not found:
            raise DataError(
                f"{folder}: no query of the length that {self.dataset} asks for; use the split"
                " without it"
            )

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> Path:
        """The image of sample ``index``."""
        return self.images[index]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image ``index`` with its queries: in training some drawn at random, otherwise all,
        canonically worded."""
        path, queries = self.images[index], self.queries[index]
        image = read_image(path, (query.size for query in queries))
        chosen = choose_wordings([query.texts for query in queries], self.options, rng)
        conversations, together = [], Together()
        for number, text in chosen:
            query = queries[number]
            with together.about(query.path):
                check_claim(query.size, image.shape, path, query.path)
                conversations.append(self._conversation(query, text.strip(), image.shape[:2], rng))
        together.raise_all()
        id = self.identities.of(path.relative_to(self.root).as_posix())
        return Sample(image, str(path), conversations, "reasoning", self.dataset, id)

    def _conversation(
        self, query: ReasoningQuery, text: str, size: tuple[int, int], rng: np.random.Generator
    ) -> Conversation:
        target, ignore, host = record_masks(read_record(query.path), size, query.path)
        # Some short queries are whole sentences all the same ("segment the wheels of the bus.").
        is_phrase = query.is_sentence is False and not is_sentence(text)
        question, explanation = word_question(
            text, is_phrase, query.explanations, self.options, rng
        )
        reply = answer(self.options.levels, self.options.wording(rng), explanation)
        return Conversation(
            turns=[(question, reply)],
            masks=target[None],
            ignore=ignore if ignore.any() else None,
            host_masks=None if host is None else host[None],
            is_sentence=query.is_sentence,
        )

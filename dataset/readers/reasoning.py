"""ReasonSeg and every data set in its layout (SynthReason, your own).

::

    <dataset_dir>/reason_seg/<Name>/{train,val,test}/*.{jpg,json}
    <dataset_dir>/reason_seg/<Name>/explanatory/train.json          optional

A JSON holds one query about one image::

    text         one or several wordings of the query
    is_sentence  true: a long query (a sentence); false: a short one (a phrase)
    shapes       labelme-like: label and points [[x, y], …]; "flag" is skipped, a label with "ignore" in it marks
                 pixels that do not count, every other label is the target

and, optionally, what ReasonSeg does not have and its other readers ignore::

    image        name of the image in the same folder (default: the JSON's own name with .jpg); JSONs may share an image
    target_rle   the target exactly, as COCO run-length {"size": [H, W], "counts": …}, instead of its polygons
    host_shapes  polygons of the object that holds the target; or host_rle, the same exactly

The JSONs of one image become one sample with several conversations.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from dataset.conversation.turns import Conversation
from dataset.conversation.wordings import (
    answer,
    explain_question,
    phrase_question,
    sentence_question,
)
from dataset.files.errors import DataError, MissingDataError
from dataset.files.faults import blame
from dataset.files.images import IMAGE_SUFFIXES, probe_images, read_image
from dataset.files.paths import list_files, named_inside, require_folder
from dataset.files.rle import decode_rle
from dataset.files.text import read_json
from dataset.readers.exclusion import without_excluded
from dataset.sample import LoaderOptions, Sample, draw_queries


def _kind_of_label(label: str) -> str:
    label = label.lower()
    if label == "flag":
        return "flag"
    return "ignore" if "ignore" in label else "target"


def _stencil(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Polygon with its outline, bool (H, W). ``points``: int32 (n, 2) as (x, y)."""
    canvas = np.zeros(size, dtype=np.uint8)
    cv2.polylines(canvas, [points], True, 1, 1)
    cv2.fillPoly(canvas, [points], 1)
    return canvas.astype(bool)


def paint_shapes(shapes: list[dict], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(target, ignore), each bool (H, W), of labelme shapes: largest area first, so a small shape
    shows on a large one.

    Coordinates are cut to whole pixels. Of two equal areas the earlier one is painted last, as in
    the published reader.
    """
    layers = [
        (
            _stencil(np.array(shape["points"], dtype=float).astype(np.int32), size),
            _kind_of_label(shape["label"]),
        )
        for shape in shapes
        if _kind_of_label(shape["label"]) != "flag"
    ]
    order = np.argsort([stencil.sum() for stencil, _ in layers], kind="stable")[::-1]
    target, ignore = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    for index in order:
        stencil, kind = layers[index]
        target[stencil], ignore[stencil] = kind == "target", kind == "ignore"
    return target, ignore


def _check_shapes(record: dict, field: str, path: Path) -> None:
    shapes = record[field]
    if not isinstance(shapes, list):
        raise DataError(f'{path}: "{field}" must be a list of {{"label": …, "points": …}}')
    for index, shape in enumerate(shapes):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise DataError(f'{path}: "{field}"[{index}] has no text "label"')
        if _kind_of_label(shape["label"]) == "flag":
            continue
        try:
            points = np.array(shape.get("points"), dtype=float)
        except (TypeError, ValueError, OverflowError):
            points = np.empty(0)
        if points.ndim != 2 or points.shape[1] != 2 or not np.all(np.abs(points) < 1e6):
            raise DataError(
                f'{path}: "{field}"[{index}] needs "points" as a list of [x, y] in pixels'
            )


def read_record(path: Path) -> dict:
    """One query JSON with its fields checked; "text" is always a list. Raises DataError naming file
    and field."""
    record = read_json(path)
    if not isinstance(record, dict) or "shapes" not in record:
        raise DataError(f'{path}: has no "shapes"; a ReasonSeg JSON needs "shapes" and "text"')
    _check_shapes(record, "shapes", path)
    if "host_shapes" in record:
        _check_shapes(record, "host_shapes", path)
    texts = [record["text"]] if isinstance(record.get("text"), str) else record.get("text")
    if (
        not isinstance(texts, list)
        or not texts
        or any(not isinstance(t, str) or not t.strip() for t in texts)
    ):
        raise DataError(f'{path}: "text" must be a list of at least one non-empty query')
    if not isinstance(record.get("is_sentence"), (bool, type(None))):
        raise DataError(f'{path}: "is_sentence" must be true or false')
    if not isinstance(record.get("image", ""), str):
        raise DataError(f'{path}: "image" must be a file name')
    return record | {"text": texts}


def record_masks(
    record: dict, size: tuple[int, int], path: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(target, ignore, host or None) of a query, each bool (H, W) for an image of ``size`` (H,
    W)."""
    target, ignore = paint_shapes(record["shapes"], size)
    if "target_rle" in record:
        target = decode_rle(record["target_rle"], size, path, "target_rle")
        ignore &= ~target
    host = None
    if "host_rle" in record:
        host = decode_rle(record["host_rle"], size, path, "host_rle")
    elif "host_shapes" in record:
        host, _ = paint_shapes(record["host_shapes"], size)
    return target, ignore, host


@dataclass(frozen=True)
class _Query:
    """One JSON: the wordings are kept, the masks are read again when they are needed."""

    path: Path
    texts: tuple[str, ...]
    is_sentence: bool | None
    explanations: tuple[str, ...]


class ReasoningSegmentation:
    """One or several splits of a data set in ReasonSeg's layout; a sample is an image with its
    queries."""

    def __init__(self, dataset_dir: str | Path, spec: str, options: LoaderOptions):
        """``spec``: "ReasonSeg|train", several splits as "ReasonSeg|train|val",
        "ReasonSeg|testshort" or "|testlong" for one length of query. All JSONs and both ends of all
        images are checked here. Raises DataError."""
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
            known = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "none"
            raise MissingDataError(f"{self.root}: no such data set; {root} holds: {known}")
        explanations = self._read_explanations()
        groups: dict[Path, list[_Query]] = defaultdict(list)
        for split in splits:
            self._read_split(split, explanations, groups)
        self.images = [path for path in sorted(groups) if self._is_usable(path)]
        if not self.images:
            raise DataError(f"{self.root}: no image of {spec} can be used")
        self.images = list(
            without_excluded(self.images, [path.name for path in self.images], options, spec)
        )
        self.queries = [groups[path] for path in self.images]

    def _read_explanations(self) -> dict[str, list[str]]:
        """JSON name -> explanations, where they are wanted and there."""
        path = self.root / "explanatory" / "train.json"
        if not self.options.training or self.options.explanatory <= 0 or not path.exists():
            return {}
        entries = read_json(path)
        found: dict[str, list[str]] = defaultdict(list)
        bad: list[tuple[str, str]] = []
        for index, entry in enumerate(entries if isinstance(entries, list) else [None]):
            if not isinstance(entry, dict) or not all(
                isinstance(entry.get(key), str) for key in ("json", "outputs")
            ):
                bad.append(
                    (
                        f"{path}:entry {index}",
                        f'{path}: entry {index} needs the texts "json" and "outputs"',
                    )
                )
                continue
            found[entry["json"]].append(entry["outputs"])
        self.options.faults.leave_out(self.dataset, bad)
        return found

    def _folder(self, split: str) -> tuple[Path, bool | None]:
        """(folder, wanted is_sentence) of "test", "testshort" or "testlong"."""
        folder = named_inside(self.root, split)
        if not folder.is_dir() and (length := re.fullmatch(r"(.+)(short|long)", split)):
            folder = named_inside(self.root, length[1])
            if folder.is_dir():
                return folder, length[2] == "long"
        if not folder.is_dir():
            known = sorted(
                p.name for p in self.root.iterdir() if p.is_dir() and p.name != "explanatory"
            )
            raise MissingDataError(
                f"{folder}: no such split of {self.root.name}; there are:"
                f" {', '.join(known) or 'none'}"
            )
        return folder, None

    def _read_split(
        self, split: str, explanations: dict[str, list[str]], groups: dict[Path, list[_Query]]
    ) -> None:
        folder, wanted = self._folder(split)
        images = {path.name: path for path in list_files(folder, IMAGE_SUFFIXES)}
        used, read, found, faults = set(), 0, False, self.options.faults
        paths = list_files(folder, (".json",))
        for path in paths:
            if faults.skips(self.dataset, path):
                continue
            with faults.guard(self.dataset, path):
                record = read_record(path)
                image = images.get(record.get("image") or self._default_image(path, images))
                if image is None:
                    expected = record.get("image") or f"{path.stem}.jpg"
                    raise MissingDataError(
                        f"{path}: its image {expected} is not in {folder}; restore it or remove the"
                        " JSON"
                    )
                used.add(image.name)
                read += 1
                if wanted is not None and record.get("is_sentence") is None:
                    raise DataError(
                        f'{path}: has no "is_sentence", which {self.dataset} needs to tell short'
                        " from long"
                    )
                if wanted in (None, record.get("is_sentence")):
                    found = True
                    query = _Query(
                        path,
                        tuple(record["text"]),
                        record.get("is_sentence"),
                        tuple(explanations.get(path.name, ())),
                    )
                    groups[image].append(query)
        # an image whose JSON is left out has done nothing wrong, and which one that is cannot be
        # known
        for name in sorted(images.keys() - used) if read == len(paths) else ():
            if not faults.skips(self.dataset, images[name]):
                with faults.guard(self.dataset, images[name]):
                    raise MissingDataError(
                        f"{images[name]}: no JSON belongs to this image; restore it or remove the"
                        " image"
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

    def _is_usable(self, image: Path) -> bool:
        faults = self.options.faults
        if faults.skips(self.dataset, image):
            return False
        with faults.guard(self.dataset, image):
            probe_images([image])
            return True
        return False

    @staticmethod
    def _default_image(path: Path, images: dict[str, Path]) -> str | None:
        return next((path.stem + s for s in IMAGE_SUFFIXES if path.stem + s in images), None)

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> Path:
        """The image of sample ``index``."""
        return self.images[index]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image ``index`` with its queries: in training some drawn at random, otherwise all,
        canonically worded."""
        image_path = self.images[index]
        image = read_image(image_path)
        conversations = [
            self._conversation(query, text, image.shape[:2], rng)
            for query, text in self._choose(index, rng)
        ]
        return Sample(
            image, str(image_path), conversations, "reasoning", self.dataset, image_path.stem
        )

    def _choose(self, index: int, rng: np.random.Generator) -> list[tuple[_Query, str]]:
        queries = self.queries[index]
        if not self.options.training:
            count = 1 if self.options.texts == "first" else None
            return [(query, text) for query in queries for text in query.texts[:count]]
        drawn = draw_queries(
            [query.texts for query in queries], self.options.num_classes_per_sample, rng
        )
        return [(queries[number], text) for number, text in drawn]

    def _conversation(
        self, query: _Query, text: str, size: tuple[int, int], rng: np.random.Generator
    ) -> Conversation:
        with blame(query.path):
            target, ignore, host = record_masks(read_record(query.path), size, query.path)
        question, explanation = self._question(query, text.strip(), rng)
        reply = answer(self.options.levels, self.options.wording(rng), explanation)
        return Conversation(
            turns=[(question, reply)],
            masks=target[None],
            ignore=ignore if ignore.any() else None,
            host_masks=None if host is None else host[None],
            is_sentence=query.is_sentence,
        )

    def _question(
        self, query: _Query, text: str, rng: np.random.Generator
    ) -> tuple[str, str | None]:
        """(question, explanation or None)."""
        # some short queries are whole sentences all the same ("segment the wheels of the bus.")
        is_phrase = query.is_sentence is False and text[-1] not in ".?!"
        if query.explanations and rng.random() < self.options.explanatory:
            explanation = query.explanations[int(rng.integers(len(query.explanations)))]
            return (
                explain_question(f"What is {text} in this image?" if is_phrase else text, rng),
                explanation,
            )
        return (phrase_question if is_phrase else sentence_question)(
            text, self.options.wording(rng)
        ), None

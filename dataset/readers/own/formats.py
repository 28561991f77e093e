"""The query that every form of a user's own data becomes: its texts, its image and the shapes of
its masks. The functions check single fields and raise DataError."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataset.files.errors import DataError
from dataset.readers.coco import LARGEST
from dataset.readers.own.arrow import TableImage
from dataset.readers.questions import as_wordings

# Fields of images and annotations that are asked; refCOCO and its like write the plural.
_SINGULAR = ("query", "caption", "expression", "sentence", "phrase", "question", "prompt", "text")
TEXT_KEYS = (*_SINGULAR, "queries", *(f"{name}s" for name in _SINGULAR[1:]))
TEXT_KEYS += ("referring_expression", "referring_expressions", "sent", "sents")
# How PNG and TIFF begin. Hugging Face datasets store a mask without a file of its own as either.
LOSSLESS = (b"\x89PNG", b"II*\0", b"MM\0*")
DETERMINER = re.compile(
    r"(the|a|an|this|that|these|those|all|any|each|every|both|some|his|her|its)(\s|$)",
    re.IGNORECASE,
)
Shape = tuple[str, Any]
"""One of ("polygons", flat lists), ("rle", {"size", "counts"}), ("png", file name), ("labelme", one
shape), and, alone as a target, ("painted", labelme shapes, targets and ignored regions)."""


@dataclass
class OwnQuery:
    """What is asked about one image of a user's own data."""

    item: str
    """Where it is written, as errors and skip lists name it: "…/train.jsonl:12"."""
    image: str
    """Name of the image, as the file gives it."""
    texts: list[str]
    """Wordings of the same query."""
    targets: list[list[Shape]]
    """The shapes of each target, which is their union; a target without a shape is empty."""
    ignore: list[Shape] = field(default_factory=list)
    answer: str | None = None
    """An explanation that follows the mask."""
    is_sentence: bool | None = None
    split: str = ""
    size: tuple[int, int] | None = None
    """(H, W) that the file claims."""
    entry: str = ""
    """The entry of its image, in files where every image has one of its own."""


def wordings_of(value: Any, where: str, name: str) -> list[str]:
    """A text or a list of several wordings as a list, each in one line."""
    texts = as_wordings(value)
    if not texts:
        raise DataError(
            f'{where}: "{name}" must be a text, or a list of wordings, none of them empty'
        )
    return [" ".join(text.split()) for text in texts]


def unread_texts(entries: Iterable[Any], read: Container[str], where: str) -> Iterator[str]:
    """A line for each field, other than those in ``read``, that holds words in some of the
    ``entries`` and would be ignored."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        for name, value in entry.items() if isinstance(entry, dict) else ():
            if name not in read:
                text = value[0] if isinstance(value, list) and value else value
                if isinstance(text, dict):
                    text = next((v for v in text.values() if isinstance(v, str)), None)
                # Names, dates and codes have no two words.
                if isinstance(text, str) and re.search(r"[^\W\d_]\s+[^\W\d_]", text):
                    found.setdefault(name, []).append(text)
    for name, texts in found.items():
        shown = " ".join(texts[0].split())[:40]
        yield (
            f'{where}: {len(texts)} have a text in "{name}" ("{shown}"), which is not asked; call'
            ' it "query" to ask it'
        )


def optional_field(entry: dict, name: str, kind: type, where: str, what: str) -> Any:
    """The field, or None where it is missing. ``what`` says in the error what it must be."""
    value = entry.get(name)
    is_blank = isinstance(value, str) and not value.strip()
    if value is not None and (is_blank or not isinstance(value, kind)):
        raise DataError(f'{where}: "{name}" must be {what}, or be left out')
    return value


def claimed_size(entry: dict, height: str, width: str, where: str) -> tuple[int, int] | None:
    """The (H, W) of the fields named ``height`` and ``width``, or None where both are missing."""
    h, w = entry.get(height), entry.get(width)
    if h is None and w is None:
        return None
    if type(h) is not int or type(w) is not int or min(h, w) < 1:
        raise DataError(
            f'{where}: "{height}" and "{width}" must be whole numbers of pixels, or be left out'
        )
    return h, w


def is_number(value: Any) -> bool:
    """Whether ``value`` may be a coordinate in pixels."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def polygons_of(value: Any, where: str, name: str) -> list[list[float]]:
    """Polygons, each [x0, y0, x1, y1, …] or [[x, y], …], as flat lists. A single polygon may stand
    without the outer list."""
    wanted = (
        f'{where}: "{name}" must be a list of polygons [x0, y0, x1, y1, …] or [[x, y], …] in pixels'
    )
    if not isinstance(value, list):
        raise DataError(wanted)
    is_single = value and (is_number(value[0]) or is_point(value[0]))
    flat = []
    for number, polygon in enumerate([value] if is_single else value):
        if not isinstance(polygon, list):
            raise DataError(wanted)
        if any(isinstance(point, list) for point in polygon):
            sound = all(map(is_point, polygon))
        else:
            sound = all(map(is_number, polygon))
        if not sound:
            raise DataError(f"{wanted}; polygon {number} holds something that is no coordinate")
        numbers = np.ravel(polygon).tolist()
        if len(numbers) < 6 or len(numbers) % 2:
            raise DataError(
                f'{where}: "{name}": polygon {number} needs at least three points, each an x'
                " and a y"
            )
        flat.append([float(x) for x in numbers])
    return flat


def is_point(value: Any) -> bool:
    """Whether ``value`` is a list [x, y] of numbers."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def rle_of(value: Any, where: str, name: str) -> dict:
    """COCO's run lengths, compressed or not; whether they fit their size is checked when they are
    decoded."""
    size: Any = value.get("size") if isinstance(value, dict) else None
    is_list = isinstance(size, list) and len(size) == 2
    if not is_list or any(type(side) is not int or side < 1 for side in size):
        raise DataError(f'{where}: "{name}" must be {{"size": [height, width], "counts": …}}')
    counts = value.get("counts")
    # pycocotools gives compressed runs as bytes, and an Arrow table keeps them so.
    counts = counts.decode("latin-1") if isinstance(counts, bytes) else counts
    if not isinstance(counts, (str, list)):
        raise DataError(f'{where}: "{name}" needs "counts", a text or a list of runs')
    return {"size": size, "counts": counts}


def png_of(value: Any, where: str, name: str) -> str:
    """The name of a mask's file, or a TableImage whose bytes are those of a lossless format."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'{where}: "{name}" must be the name of a PNG')
    if isinstance(value, TableImage):
        if not value.open().read(4).startswith(LOSSLESS):
            raise DataError(
                f'{where}: "{name}" is no PNG; a mask must be one (other formats change pixels)'
            )
    elif not value.lower().endswith(".png"):
        raise DataError(
            f'{where}: "{name}" is {value!r}; a mask must be a PNG (other formats change pixels)'
        )
    return value


def with_article(text: str) -> str:
    """ "dog" -> "the dog"; a text that begins with a determiner or is a sentence stays."""
    return text if text[-1] in ".?!" or DETERMINER.match(text) else f"the {text}"

"""One kind of query for all forms of your own data: its texts, its picture, and what encloses its
masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dataset.files.errors import DataError
from dataset.readers.coco import LARGEST
from dataset.readers.own.arrow import Cell

TEXT_KEYS = ("query", "caption", "expression")


# how PNG and TIFF begin; datasets stores masks without a file of their own as either
LOSSLESS = (b"\x89PNG", b"II*\0", b"MM\0*")


DETERMINERS = (
    "the",
    "a",
    "an",
    "this",
    "that",
    "these",
    "those",
    "all",
    "any",
    "each",
    "every",
    "both",
    "some",
    "his",
    "her",
    "its",
)


@dataclass
class Query:
    """What is asked about one image.

    A shape is one of ("polygons", flat lists), ("rle", {"size", "counts"}), ("png", file name),
    ("labelme", one shape), and, alone as a target, ("painted", shapes with targets and ignored
    regions among them).
    """

    item: str
    """Where it is written, "…/train.jsonl:12": named by errors and by skip lists."""
    image: str
    """Name of the image, as the file gives it."""
    texts: list[str]
    """Wordings of the same query."""
    targets: list[list[tuple[str, Any]]]
    """The shapes of each target, which is their union; no shape: an empty target."""
    ignore: list[tuple[str, Any]] = field(default_factory=list)
    answer: str | None = None
    """An explanation that follows the mask."""
    is_sentence: bool | None = None
    split: str = ""
    size: tuple[int, int] | None = None
    """(H, W) that the file claims."""


# ------------------------------------------------------------------------------------------- fields


def texts_of(value: Any, where: str, name: str) -> list[str]:
    """One text or several wordings as a list, each in one line. Raises DataError."""
    texts = [value] if isinstance(value, str) else value
    if (
        not isinstance(texts, list)
        or not texts
        or any(not isinstance(t, str) or not t.strip() for t in texts)
    ):
        raise DataError(
            f'{where}: "{name}" must be a text, or a list of wordings, none of them empty'
        )
    return [" ".join(text.split()) for text in texts]


def optional(entry: dict, name: str, kind: type, where: str, what: str) -> Any:
    value = entry.get(name)
    if value is not None and not (isinstance(value, kind) and (kind is not str or value.strip())):
        raise DataError(f'{where}: "{name}" must be {what}, or be left out')
    return value


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def polygons_of(value: Any, where: str, name: str) -> list[list[float]]:
    """Polygons, each [x0, y0, x1, y1, …] or [[x, y], …], as flat lists; a single one may stand
    alone. Raises DataError."""
    wanted = (
        f'{where}: "{name}" must be a list of polygons [x0, y0, x1, y1, …] or [[x, y], …] in pixels'
    )
    if not isinstance(value, list):
        raise DataError(wanted)
    is_point = [isinstance(v, list) and len(v) == 2 and all(map(is_number, v)) for v in value]
    alone = value and (is_number(value[0]) or is_point[0])
    flat = []
    for number, polygon in enumerate([value] if alone else value):
        if not isinstance(polygon, list):
            raise DataError(wanted)
        nested = any(isinstance(point, list) for point in polygon)
        numbers = [x for point in polygon for x in (point if isinstance(point, list) else [point])]
        if not all(map(is_number, numbers)) or (
            nested and any(not isinstance(p, list) or len(p) != 2 for p in polygon)
        ):
            raise DataError(f"{wanted}; polygon {number} holds something that is no coordinate")
        if len(numbers) < 6 or len(numbers) % 2:
            raise DataError(
                f'{where}: "{name}": polygon {number} needs at least three points, each an x'
                " and a y"
            )
        flat.append([float(x) for x in numbers])
    return flat


def rle_of(value: Any, where: str, name: str) -> dict:
    size = value.get("size") if isinstance(value, dict) else None
    if (
        not isinstance(size, list)
        or len(size) != 2
        or any(type(n) is not int or n < 1 for n in size)
    ):
        raise DataError(f'{where}: "{name}" must be {{"size": [height, width], "counts": …}}')
    counts = value.get("counts")
    # as pycocotools gives them to an Arrow table
    counts = counts.decode("latin-1") if isinstance(counts, bytes) else counts
    if not isinstance(counts, (str, list)):
        raise DataError(f'{where}: "{name}" needs "counts", a text or a list of runs')
    return {"size": size, "counts": counts}


def png_of(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'{where}: "{name}" must be the name of a PNG')
    if isinstance(value, Cell):
        if not value.open().read(4).startswith(LOSSLESS):
            raise DataError(
                f'{where}: "{name}" is no PNG; a mask must be one (other formats change pixels)'
            )
        return value
    if not value.lower().endswith(".png"):
        raise DataError(
            f'{where}: "{name}" is {value!r}; a mask must be a PNG (other formats change pixels)'
        )
    return value


def with_article(text: str) -> str:
    """ "dog" -> "the dog"; what begins with a determiner or is a sentence stays as it is."""
    return text if text[-1] in ".?!" or text.split()[0].lower() in DETERMINERS else f"the {text}"

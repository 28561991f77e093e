"""Your own data as labelme files, one beside each picture."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from dataset.files.errors import DataError
from dataset.files.faults import Faults, blame
from dataset.files.images import IMAGE_SUFFIXES
from dataset.files.paths import list_files
from dataset.files.text import read_json
from dataset.readers.own.formats import Query, is_number, optional, texts_of, with_article

CIRCLE_POINTS = 72


# ------------------------------------------------------------------------------------------ labelme


def read_labelme(folder: Path, faults: Faults, dataset: str, split: str) -> Iterator[Query]:
    """The labelme JSONs of a folder. With "text" a JSON is one query about its targets, otherwise
    every label is a query."""
    for path in list_files(folder, (".json",)):
        if faults.skips(dataset, path):
            continue
        with faults.guard(dataset, path), blame(path):
            yield from _labelme(path, split)


def _labelme(path: Path, split: str) -> list[Query]:
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("shapes"), list):
        raise DataError(f'{path}: has no list "shapes"; a JSON of labelme is expected')
    size = _labelme_size(record, path)
    image = optional(record, "image", str, str(path), "a file name") or _labelme_image(record, path)
    shapes = [
        _labelme_shape(shape, f'{path}: "shapes"[{number}]')
        for number, shape in enumerate(record["shapes"])
    ]
    common = {"image": image, "split": split, "size": size}
    if "text" in record:
        texts = texts_of(record["text"], str(path), "text")
        answer = optional(record, "answer", str, str(path), "a text")
        is_sentence = optional(record, "is_sentence", bool, str(path), "true or false")
        if any(shape and "mask" in shape for shape in shapes):
            raise DataError(
                f'{path}: with "text" every shape must be drawn as a polygon, rectangle or circle,'
                " one is a mask"
            )
        painted = [("painted", [shape for shape in shapes if shape is not None])]
        return [
            Query(
                str(path),
                texts=texts,
                targets=[painted],
                answer=answer,
                is_sentence=is_sentence,
                **common,
            )
        ]
    ignored = [
        ("labelme", shape)
        for shape in shapes
        if shape and shape["label"].lower() in ("ignore", "__ignore__")
    ]
    labels: dict[str, list] = {}
    for shape in shapes:
        if shape and shape["label"].lower() not in ("ignore", "__ignore__"):
            labels.setdefault(" ".join(shape["label"].split()), []).append(("labelme", shape))
    if not labels:
        raise DataError(
            f'{path}: has no shape to ask for; draw one, or add "text" for a query about nothing'
        )
    return [
        Query(str(path), texts=[with_article(t)], targets=[s], ignore=ignored, **common)
        for t, s in labels.items()
    ]


def _labelme_size(record: dict, path: Path) -> tuple[int, int] | None:
    size = record.get("imageHeight"), record.get("imageWidth")
    if size == (None, None):
        return None
    if any(type(n) is not int or n < 1 for n in size):
        raise DataError(
            f'{path}: "imageHeight" and "imageWidth" must be whole numbers of pixels, or be'
            " left out"
        )
    return size


def _labelme_image(record: dict, path: Path) -> str:
    """Name of the image. labelme writes the way from the JSON to it, on Windows with backslashes;
    the way is not followed."""
    name = optional(record, "imagePath", str, str(path), "a file name")
    if name is not None:
        return PureWindowsPath(name).name
    return next(
        (path.stem + s for s in IMAGE_SUFFIXES if path.with_suffix(s).is_file()), f"{path.stem}.jpg"
    )


def _labelme_shape(shape: Any, where: str) -> dict | None:
    """{"label", "points"} of a shape, polygons all of them, or {"label", "points", "mask"}; None
    for "flag" and background."""
    if (
        not isinstance(shape, dict)
        or not isinstance(shape.get("label"), str)
        or not shape["label"].strip()
    ):
        raise DataError(f'{where}: has no text "label"')
    if shape["label"].lower() in ("flag", "_background_"):
        return None
    kind = shape.get("shape_type") or "polygon"
    if kind not in ("polygon", "rectangle", "circle", "mask"):
        raise DataError(
            f'{where}: "shape_type" {kind!r} has no area; draw a polygon, rectangle, circle or mask'
        )
    points = shape.get("points")
    if not isinstance(points, list) or any(
        not isinstance(p, list) or len(p) != 2 or not all(map(is_number, p)) for p in points
    ):
        raise DataError(f'{where}: needs "points" as a list of [x, y] in pixels')
    if not points or (kind != "polygon" and len(points) != 2):
        raise DataError(
            f"{where}: a {kind} has {'at least 1 point' if kind == 'polygon' else '2 points'},"
            f" found {len(points)}"
        )
    if kind == "mask":
        return {
            "label": shape["label"],
            "points": points,
            "mask": _labelme_mask(shape.get("mask"), where),
        }
    return {"label": shape["label"], "points": _outline(kind, points)}


def _outline(kind: str, points: list[list[float]]) -> list[list[float]]:
    """Points of the polygon that a labelme shape is."""
    if kind == "polygon":
        return points
    (x0, y0), (x1, y1) = points
    if kind == "rectangle":
        return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
    radius = math.hypot(x1 - x0, y1 - y0)  # a circle's second point lies on it
    angles = [2 * math.pi * k / CIRCLE_POINTS for k in range(CIRCLE_POINTS)]
    # cutting would shift it
    return [[round(x0 + radius * math.cos(a)), round(y0 + radius * math.sin(a))] for a in angles]


def _labelme_mask(value: Any, where: str) -> str:
    try:
        if base64.b64decode(value, validate=True)[:4] == b"\x89PNG":
            return value
    except (TypeError, ValueError):
        pass
    raise DataError(f'{where}: "mask" must be a PNG in base64')

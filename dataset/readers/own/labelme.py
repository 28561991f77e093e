"""A user's own data as labelme files, one beside each image."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset.files.errors import DataError
from dataset.files.faults import Faults, blame
from dataset.files.paths import list_files
from dataset.files.text import read_json
from dataset.readers.own.dialects import tool_of
from dataset.readers.own.formats import (
    OwnQuery,
    Shape,
    claimed_size,
    is_point,
    optional_field,
    with_article,
    wordings_of,
)
from dataset.readers.questions import readable_name
from dataset.readers.reasoning import paint_shapes

CIRCLE_POINTS = 72
IGNORED_LABELS = ("ignore", "__ignore__")


def read_labelme(folder: Path, faults: Faults, dataset: str, split: str) -> Iterator[OwnQuery]:
    """The queries of the labelme JSONs of a folder. A JSON with "text" is one query about its
    targets; in any other, every label is a query."""
    for path in list_files(folder, (".json",)):
        if faults.skips(dataset, path):
            continue
        with faults.guard(dataset, path), blame(path):
            yield from _queries_of(path, split)


def _queries_of(path: Path, split: str) -> list[OwnQuery]:
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("shapes"), list):
        raise DataError(
            f'{path}: has no list "shapes"; a JSON of labelme is expected{tool_of(record)}'
        )
    where = str(path)
    size = claimed_size(record, "imageHeight", "imageWidth", where)
    image = optional_field(record, "image", str, where, "a file name") or _image_name(record, path)
    read = (
        _read_shape(shape, f'{path}: "shapes"[{number}]')
        for number, shape in enumerate(record["shapes"])
    )
    shapes = [shape for shape in read if shape is not None]
    query = partial(OwnQuery, item=where, image=image, split=split, size=size)
    if record.get("text") not in (None, ""):  # Tools of OCR write an empty one.
        texts = wordings_of(record["text"], where, "text")
        explanation = optional_field(record, "answer", str, where, "a text")
        is_sentence = optional_field(record, "is_sentence", bool, where, "true or false")
        if any("mask" in shape for shape in shapes):
            raise DataError(
                f'{path}: with "text" every shape must be drawn as a polygon, rectangle or circle,'
                " one is a mask"
            )
        targets: list[list[Shape]] = [[("painted", shapes)]]
        return [query(texts=texts, targets=targets, answer=explanation, is_sentence=is_sentence)]
    ignored: list[Shape] = []
    by_label: dict[str, list[Shape]] = {}
    for shape in shapes:
        if shape["label"].lower() in IGNORED_LABELS:
            ignored.append(("labelme", shape))
        else:
            label = " ".join(shape["label"].split())
            by_label.setdefault(readable_name(label), []).append(("labelme", shape))
    if not by_label:
        raise DataError(
            f'{path}: has no shape to ask for; draw one, or add "text" for a query about nothing'
        )
    return [
        query(texts=[with_article(label)], targets=[same_label], ignore=ignored)
        for label, same_label in by_label.items()
    ]


def _image_name(record: dict, path: Path) -> str:
    """The name of the image, which is looked for where those of all own data are."""
    name = optional_field(record, "imagePath", str, str(path), "a file name")
    return path.stem if name is None else name  # of any photo's ending


def _read_shape(shape: Any, where: str) -> dict | None:
    """A shape as the polygon {"label", "points"} or as {"label", "points", "mask"}; None for "flag"
    and background. Raises DataError."""
    label = shape.get("label") if isinstance(shape, dict) else None
    if not isinstance(label, str) or not label.strip():
        raise DataError(f'{where}: has no text "label"')
    if label.lower() in ("flag", "_background_"):
        return None
    kind = shape.get("shape_type") or "polygon"
    if kind not in ("polygon", "rectangle", "circle", "mask"):
        raise DataError(
            f'{where}: "shape_type" {kind!r} has no area; draw a polygon, rectangle, circle or mask'
        )
    points = shape.get("points")
    if not isinstance(points, list) or not all(map(is_point, points)):
        raise DataError(f'{where}: needs "points" as a list of [x, y] in pixels')
    if not points or (kind != "polygon" and len(points) != 2):
        raise DataError(
            f"{where}: a {kind} has {'at least 1 point' if kind == 'polygon' else '2 points'},"
            f" found {len(points)}"
        )
    if kind == "mask":
        mask = _checked_mask(shape.get("mask"), where)
        return {"label": label, "points": points, "mask": mask}
    return {"label": label, "points": _outline(kind, points)}


def _outline(kind: str, points: list[list[float]]) -> list[list[float]]:
    """The points of a polygon, rectangle or circle as those of a polygon."""
    if kind == "polygon":
        return points
    (x0, y0), (x1, y1) = points
    if kind == "rectangle":
        return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
    radius = math.hypot(x1 - x0, y1 - y0)  # from the centre to a point on the circle
    angles = [2 * math.pi * k / CIRCLE_POINTS for k in range(CIRCLE_POINTS)]
    # Points are rounded, because cutting to whole pixels (paint_shapes) would shift the circle.
    return [[round(x0 + radius * math.cos(a)), round(y0 + radius * math.sin(a))] for a in angles]


def _checked_mask(value: Any, where: str) -> str:
    try:
        if base64.b64decode(value, validate=True)[:4] == b"\x89PNG":
            return value
    except (TypeError, ValueError):
        pass
    raise DataError(f'{where}: "mask" must be a PNG in base64')


def draw_labelme(shape: dict, size: tuple[int, int], where: str) -> np.ndarray:
    """One shape, its outline and its inside, as bool (H, W) for an image of ``size`` (H, W).
    Coordinates are cut to whole pixels, as in ReasonSeg. Raises DataError."""
    if "mask" not in shape:
        return paint_shapes([{"label": "target", "points": shape["points"]}], size)[0]
    # The mask is a PNG of the box between the two points, both of them inside.
    try:
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(shape["mask"]))).convert("L")) > 0
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(
            f'{where}: the PNG in a shape\'s "mask" is broken ({" ".join(str(error).split())})'
        ) from None
    x0, y0 = (int(v) for v in np.min(shape["points"], axis=0))
    height, width = pixels.shape
    if min(x0, y0) < 0 or y0 + height > size[0] or x0 + width > size[1]:
        raise DataError(
            f'{where}: a shape\'s "mask" of {height}×{width} pixels at ({x0}, {y0}) leaves the'
            " image"
        )
    mask = np.zeros(size, dtype=bool)
    mask[y0 : y0 + height, x0 : x0 + width] = pixels
    return mask

"""Spellings of shapes. What tools write becomes polygons in pixels of the original frame; what is
not understood raises DataError."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cores.dataset.files.errors import BOXES_ONLY, DataError
from cores.dataset.files.rle import rle_size

LARGEST = 1e6  # pixels; no image has such a side, so a coordinate beyond it is a mistake
SLOP = 2  # pixels by which annotators and their tools miss the border of an image
CIRCLE_POINTS = 72
# What labelme and the tools that write its format draw with two, and with four points; labelme's
# "rectangle" has two, X-AnyLabeling's four.
TWO_POINTS = ("rectangle", "circle", "mask")
FOUR_POINTS = ("rectangle", "rotation", "oriented_rectangle", "rotated_rectangle", "quadrilateral")
WITHOUT_AREA = ("point", "points", "line", "linestrip", "polyline")
DRAWN = "draw a polygon, rectangle, circle or mask"


def is_number(value: Any) -> bool:
    """Whether ``value`` may be a coordinate in pixels."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def is_point(value: Any) -> bool:
    """Whether ``value`` is a list [x, y] of numbers."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def _plain(value: Any, depth: int = 4) -> Any:
    """``value``, lists in lists up to ``depth``, with each {"x": …, "y": …} as [x, y] and each
    number that is written as a text as a number."""
    if isinstance(value, list) and depth:
        return [_plain(part, depth - 1) for part in value]
    if isinstance(value, dict) and {"x", "y"} <= value.keys():
        return [_plain(value["x"], 0), _plain(value["y"], 0)]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def polygons_of(value: Any, where: str, name: str) -> list[list[float]]:
    """Polygons, each [x0, y0, x1, y1, …], [[x, y], …] or [{"x": x, "y": y}, …], as flat lists. A
    single polygon may stand without the outer list, and numbers as texts."""
    try:
        return _flat_polygons(value, where, name)
    except DataError:
        if (plain := _plain(value)) == value:
            raise
    return _flat_polygons(plain, where, name)


def _flat_polygons(value: Any, where: str, name: str) -> list[list[float]]:
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


def rle_of(value: Any, where: str, name: str) -> dict:
    """COCO's run lengths, compressed or not; whether they fit their size is checked when they are
    decoded."""
    size = rle_size(value)
    if size is None or min(size) < 1:
        raise DataError(f'{where}: "{name}" must be {{"size": [height, width], "counts": …}}')
    counts = value.get("counts")
    # pycocotools gives compressed runs as bytes, and an Arrow table keeps them so.
    counts = counts.decode("latin-1") if isinstance(counts, bytes) else counts
    if not isinstance(counts, (str, list)):
        raise DataError(f'{where}: "{name}" needs "counts", a text or a list of runs')
    return {"size": list(size), "counts": counts}


def is_missing(segmentation: Any) -> bool:
    """Whether a segmentation says nothing; [] says that nothing is there."""
    return segmentation is None or segmentation == [[]]


def refuse_boxes(entry: dict, where: str) -> None:
    """Raises DataError for an annotation of COCO's format with a box, keypoints or nothing, but no
    mask: it must not pass for an empty target."""
    segmentation: Any = entry.get("segmentation")
    box: Any = entry.get("bbox")
    is_box = isinstance(box, list) and len(box) == 4 and all(map(is_number, box))
    has_area = is_box and box[2] > 0 and box[3] > 0
    if is_missing(segmentation) or (segmentation == [] and has_area):
        raise DataError(f"{where}: {BOXES_ONLY}")


def hint_of_inline(record: dict) -> str:
    """What to add where the image of a labelme JSON is missing: it may be in the JSON itself."""
    if not isinstance(record.get("imageData"), str) or not record["imageData"]:
        return ""
    return ' ("imageData" in the JSON holds it: labelme_export_json writes it to a file)'


def kind_of(shape: dict, where: str) -> str:
    """The "shape_type" of a labelme shape. Raises DataError for one that is no known kind."""
    kind = shape.get("shape_type") or "polygon"
    kind = kind.strip().lower() if isinstance(kind, str) else kind
    if kind not in ("polygon", *TWO_POINTS, *FOUR_POINTS, *WITHOUT_AREA):
        raise DataError(f'{where}: the "shape_type" {kind!r} is not known; {DRAWN}')
    return kind


def outline(shape: dict, where: str, least: int = 1) -> np.ndarray:
    """The corners, float (n, 2) as (x, y), of the polygon that a labelme shape means; of a mask,
    those of its box. ``least``: the fewest points of a polygon; the published reader of ReasonSeg
    draws those of one and two points, too. Raises DataError."""
    kind = kind_of(shape, where)
    if kind in WITHOUT_AREA:
        raise DataError(f'{where}: "shape_type" {kind!r} has no area; {DRAWN}')
    points = _points(shape.get("points"), where)
    allowed = [2] * (kind in TWO_POINTS) + [4] * (kind in FOUR_POINTS)
    if len(points) < least if kind == "polygon" else len(points) not in allowed:
        counts = f"at least {least}" if kind == "polygon" else " or ".join(map(str, allowed))
        raise DataError(f"{where}: a {kind} has {counts} points, found {len(points)}")
    if kind == "mask":
        _check_png(shape.get("mask"), where)
    elif kind == "circle":
        return _circle(points)
    elif len(points) == 2 and kind == "rectangle":
        (x0, y0), (x1, y1) = points
        return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    return points


def _points(value: Any, where: str) -> np.ndarray:
    for spelled in (lambda: value, lambda: _plain(value)):  # The second is slow and rarely needed.
        try:
            points = np.array(spelled(), dtype=float)
        except (TypeError, ValueError, OverflowError):
            continue
        # NaN is not smaller either.
        if points.ndim == 2 and points.shape[1] == 2 and np.all(np.abs(points) < LARGEST):
            return points
    raise DataError(f'{where} needs "points" as a list of [x, y] in pixels')


def _circle(points: np.ndarray) -> np.ndarray:
    """``points``: the centre and a point on the circle."""
    (x0, y0), (x1, y1) = points.tolist()
    radius = math.hypot(x1 - x0, y1 - y0)
    angles = [2 * math.pi * k / CIRCLE_POINTS for k in range(CIRCLE_POINTS)]
    # Points are rounded, because cutting to whole pixels, as is usual here, would shift the circle.
    corners = [(x0 + radius * math.cos(a), y0 + radius * math.sin(a)) for a in angles]
    return np.array([[round(x), round(y)] for x, y in corners], dtype=float)


def _check_png(value: Any, where: str) -> None:
    try:
        if base64.b64decode(value, validate=True)[:4] == b"\x89PNG":
            return
    except (TypeError, ValueError):
        pass
    raise DataError(f'{where}: "mask" must be a PNG in base64')


def may_be_misplaced(low: float, high: float, size: Sequence[int]) -> bool:
    """Whether coordinates between ``low`` and ``high`` are worth ``refuse_misplaced``, which is
    slower."""
    return low < -SLOP or high <= 1 or high > min(size) + SLOP


def refuse_misplaced(
    points: np.ndarray, covered: int, size: tuple[int, int], where: str, may_leave: bool = False
) -> None:
    """Raises DataError for a polygon that was drawn in another frame than its image's: all its
    coordinates, float (n, 2), lie between 0 and 1, or it leaves the image of ``size`` (H, W) by
    more than annotators miss the border, and less than half of it is inside.

    ``covered``: pixels that it covers. ``may_leave``: as long as it covers any.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    # ReasonSeg has stray clicks of one and two points.
    if len(points) > 2 and low.min() >= 0 and high.max() <= 1 and max(size) > 1:
        raise DataError(
            f"{where}: all coordinates lie between 0 and 1, as YOLO writes them; multiply them by"
            " the width and height of the image, in pixels"
        )
    if low.min() >= -SLOP and high[0] <= size[1] + SLOP and high[1] <= size[0] + SLOP:
        return
    x, y = points.T
    # Of a polygon that crosses itself this is less than its area, and less is refused.
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    blur = np.sum(high - low)  # Drawing a polygon in pixels changes it by less along its border.
    if not covered or (covered + blur < area / 2 and not may_leave):
        raise DataError(
            f"{where}: a shape from ({low[0]:g}, {low[1]:g}) to ({high[0]:g}, {high[1]:g}) lies"
            f" {'mostly ' if covered else ''}outside its image of {size[0]}×{size[1]} (height ×"
            " width); was it drawn on a photo of another size?"
        )

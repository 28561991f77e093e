"""From shapes and files to masks. H and W are the size of an image in the *original* frame."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as rle_codec

from cores.dataset.annotations.shapes import (
    LARGEST,
    is_missing,
    kind_of,
    may_be_misplaced,
    outline,
    polygons_of,
    refuse_misplaced,
)
from cores.dataset.files.errors import BOXES_ONLY, DataError
from cores.dataset.files.images import EmbeddedImage, check_size, read_label
from cores.dataset.files.rle import decode_rle


def _coordinates(points: object) -> np.ndarray | None:
    """A flat polygon as float (2 n,); None for what pycocotools cannot draw: it takes four numbers
    for a box, and NaN or 1e9 kill the process."""
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        return None
    try:
        values = np.array(points)
    except ValueError:  # The list holds lists of different lengths.
        return None
    if values.ndim != 1 or values.dtype.kind not in "if":
        return None
    return values if values.min() > -LARGEST and values.max() < LARGEST else None


def annotation_mask(
    segmentation: list | dict | None,
    size: tuple[int, int],
    path: str | Path,
    field: str,
    thin: bool = False,
) -> np.ndarray:
    """A COCO segmentation (polygons in any spelling, run lengths, compressed run lengths, a list of
    any of them) as bool (H, W) for an image of ``size`` (H, W).

    ``thin``: polygons of one or two points, which enclose nothing, are skipped instead of refused.
    Raises DataError naming ``path`` and ``field``.
    """
    if isinstance(segmentation, dict):
        return decode_rle(segmentation, size, path, field)
    if is_missing(segmentation):
        raise DataError(f"{path}: {field} {BOXES_ONLY}")
    if not isinstance(segmentation, list):
        raise DataError(f"{path}: {field} must be polygons or run lengths")
    is_runs = [isinstance(part, dict) and "counts" in part for part in segmentation]
    polygons = [part for part, runs in zip(segmentation, is_runs, strict=True) if not runs]
    if thin:
        polygons = [p for p in polygons if not isinstance(p, list) or len(p) not in (2, 4)]
    drawn = [_coordinates(polygon) for polygon in polygons]
    if any(values is None for values in drawn):
        try:
            polygons = polygons_of(polygons, str(path), field)
        except DataError:
            raise DataError(
                f"{path}: {field} must be polygons of at least three points [x0, y0, x1, …] in"
                " pixels, or run lengths"
            ) from None
        drawn = [_coordinates(polygon) for polygon in polygons]
    mask = _filled(polygons, drawn, size, f"{path}: {field}")
    for part, runs in zip(segmentation, is_runs, strict=True):
        if runs:  # refCLEF writes one region as several run lengths.
            mask |= decode_rle(part, size, path, field)
    return mask


def _filled(
    polygons: list[list[float]],
    drawn: Sequence[np.ndarray | None],
    size: tuple[int, int],
    where: str,
) -> np.ndarray:
    """The union of flat polygons, bool (H, W), whose coordinates are ``drawn``, too."""
    if not polygons:
        return np.zeros(size, dtype=bool)
    try:
        runs = rle_codec.frPyObjects(polygons, *size)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} is not a valid polygon ({error})") from None
    for values, one in zip(drawn, runs, strict=True):
        if values is None or not may_be_misplaced(values.min(), values.max(), size):
            continue
        # A sliver in the first corner is sound beside a part that tells the frame.
        is_sliver = values.min() >= 0 and values.max() <= 1
        if not is_sliver or all(v is None or v.max() <= 1 for v in drawn):
            refuse_misplaced(values.reshape(-1, 2), int(rle_codec.area(one)), size, where)
    return rle_codec.decode(rle_codec.merge(runs)).astype(bool)


def instance_masks(
    entries: list[dict], size: tuple[int, int], source: Path, thin: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(union of the instances, crowd regions outside of it), each bool (H, W), of annotations.
    ``thin``: as in ``annotation_mask``. Raises DataError naming ``source`` and the annotation."""
    target, crowd = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    for entry in entries:
        field = f'annotation {entry["id"]} "segmentation"'
        union = crowd if entry.get("iscrowd") else target
        union |= annotation_mask(entry["segmentation"], size, source, field, thin)
    return target, crowd & ~target


def kind_of_label(label: str) -> str:
    """What a label means in ReasonSeg's layout: "flag" (nothing), "ignore" or "target"."""
    label = label.lower()
    if label == "flag":
        return "flag"
    return "ignore" if "ignore" in label else "target"


def draw_shape(shape: dict, size: tuple[int, int], where: str) -> np.ndarray:
    """A labelme shape, its outline and its inside, as bool (H, W) for an image of ``size`` (H, W).
    Coordinates are cut to whole pixels, as in ReasonSeg. Raises DataError."""
    points = outline(shape, where)
    kind = kind_of(shape, where)
    if kind == "mask":
        return _pasted(shape["mask"], points, size, where)
    canvas = np.zeros(size, dtype=np.uint8)
    corners = points.astype(np.int32)
    cv2.polylines(canvas, [corners], True, (1,), 1)
    cv2.fillPoly(canvas, [corners], (1,))
    if may_be_misplaced(points.min(), points.max(), size):
        refuse_misplaced(points, cv2.countNonZero(canvas), size, where, may_leave=kind == "circle")
    return canvas.astype(bool)


class _InlinePicture:
    """A picture inside a JSON, as base64."""

    def __init__(self, text: str, name: str):
        self.text, self.name = text, name

    def __str__(self) -> str:
        return self.name

    def open(self, mode: str) -> io.BytesIO:
        return io.BytesIO(base64.b64decode(self.text))


def _pasted(png: str, points: np.ndarray, size: tuple[int, int], where: str) -> np.ndarray:
    """labelme's mask: a PNG of the box between two points, both of them inside."""
    pixels = read_label(_InlinePicture(png, f'{where} "mask"'), colours=True) != 0
    x0, y0 = (int(v) for v in points.min(axis=0))
    height, width = pixels.shape
    if min(x0, y0) < 0 or y0 + height > size[0] or x0 + width > size[1]:
        raise DataError(
            f'{where}: a shape\'s "mask" of {height}×{width} pixels at ({x0}, {y0}) leaves the'
            " image"
        )
    mask = np.zeros(size, dtype=bool)
    mask[y0 : y0 + height, x0 : x0 + width] = pixels
    return mask


def paint_shapes(
    shapes: list[dict], size: tuple[int, int], where: str = "shapes"
) -> tuple[np.ndarray, np.ndarray]:
    """(target, ignore), each bool (H, W), of labelme shapes. They are painted from the largest area
    to the smallest, so that a small shape shows on a large one.

    Of two equal areas the earlier one is painted last, as in the published reader. Raises
    DataError.
    """
    layers = []
    for number, shape in enumerate(shapes):
        if (kind := kind_of_label(shape["label"])) != "flag":
            layers.append((draw_shape(shape, size, f"{where}[{number}]"), kind))
    order = np.argsort([np.count_nonzero(stencil) for stencil, _ in layers], kind="stable")[::-1]
    target, ignore = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    for index in order:
        stencil, kind = layers[index]
        target[stencil], ignore[stencil] = kind == "target", kind == "ignore"
    return target, ignore


def read_mask(path: str | Path | EmbeddedImage, size: tuple[int, int]) -> np.ndarray:
    """A mask file as bool (H, W) of ``size``: 0 or black is background, one other value or colour
    is the target. Raises DataError."""
    label = read_label(path, colours=True)
    check_size(label.shape, size, str(path), "the mask")
    # The largest and the smallest value tell without sorting all of them.
    high = label.max(initial=0)
    if high and ((label != 0) & (label != high)).any():
        values = np.unique(label[label != 0])
        reason = "write one PNG per target"
        if values[-1] == 255 and len(values) == 2:
            reason += '; if 255 is the border that VOC does not count, it belongs in "ignore"'
        elif len(values) > 2:
            reason += ", or threshold it, if it was made smaller or larger and its edge is soft"
        raise DataError(
            f"{path}: a mask has two values, 0 and another; this one holds {len(values)} values"
            f" besides 0: {reason}"
        )
    return label != 0

"""What annotation tools write instead of COCO's format, translated into it: VIA, Datumaro and
Supervisely. For what is not read, the way to export it."""

from __future__ import annotations

import base64
import io
import math
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cores.dataset.annotations.masks import annotation_mask
from cores.dataset.files.errors import DataError
from cores.dataset.files.faults import Faults, blame
from cores.dataset.files.lookup import base_name
from cores.dataset.files.paths import list_files
from cores.dataset.files.rle import encode_rle
from cores.dataset.files.text import read_json
from cores.dataset.readers.own.coco import FAULT, is_coco, read_coco
from cores.dataset.readers.own.formats import OwnQuery

CURVE_POINTS = 72
LABEL_ATTRIBUTES = ("label", "class", "name", "category", "object", "type")


def _ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> list[float]:
    """The outline of an ellipse as a flat polygon; ``angle`` in radians, clockwise on screen."""
    turns = 2 * math.pi * np.arange(CURVE_POINTS) / CURVE_POINTS
    u, v = rx * np.cos(turns), ry * np.sin(turns)
    xs = x + u * math.cos(angle) - v * math.sin(angle)
    ys = y + u * math.sin(angle) + v * math.cos(angle)
    return np.stack([xs, ys], axis=1).ravel().tolist()


def _box(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


class _Translation:
    """A file in COCO's format, as it grows."""

    def __init__(self, labels: list[str] | None = None):
        self.labels = labels or []
        self.images: list[dict] = []
        self.annotations: list[dict] = []

    def add(self, image: Any, place: str, label: str | None, make: Callable[[], Any]) -> None:
        """An annotation, called ``place`` in messages, whose segmentation ``make`` gives. What is
        wrong with it is found where annotations are checked."""
        entry = {"id": f"{image} {place}", "image_id": image}
        try:
            entry["segmentation"] = make()
        except DataError as error:
            entry[FAULT] = str(error)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            entry[FAULT] = "its shape lacks a field, or one that is no number"
        if label is None:
            entry[FAULT] = f"has no label (an attribute such as {LABEL_ATTRIBUTES[0]!r})"
        else:
            if label not in self.labels:
                self.labels.append(label)
            entry["category_id"] = self.labels.index(label)
        self.annotations.append(entry)

    def content(self) -> dict:
        categories = [{"id": i, "name": label} for i, label in enumerate(self.labels)]
        found = {"images": self.images, "annotations": self.annotations}
        return found | {"categories": categories}


def _is_via(content: Any) -> bool:
    entries = list(content.values()) if isinstance(content, dict) else []
    return bool(entries) and all(
        isinstance(entry, dict) and "filename" in entry and "regions" in entry for entry in entries
    )


def _via_label(attributes: Any) -> str | None:
    """The label among the attributes of a region: the only one that has a value, or that of a
    usual name."""
    found = {}
    for name, value in attributes.items() if isinstance(attributes, dict) else ():
        if isinstance(value, dict):  # boxes to tick
            value = " ".join(key for key, ticked in value.items() if ticked)
        if isinstance(value, str) and value.strip() and value != "undefined":
            found[name] = value.strip()
    if len(found) == 1:
        return next(iter(found.values()))
    lower = {name.lower(): value for name, value in found.items()}
    return next((lower[name] for name in LABEL_ATTRIBUTES if name in lower), None)


def _via_shape(shape: Any) -> list[list[float]]:
    kind = shape["name"]
    if kind == "polygon":
        points = zip(shape["all_points_x"], shape["all_points_y"], strict=True)
        return [[float(value) for point in points for value in point]]
    if kind == "rect":
        return [_box(shape["x"], shape["y"], shape["width"], shape["height"])]
    if kind == "circle":
        return [_ellipse(shape["cx"], shape["cy"], shape["r"], shape["r"])]
    if kind == "ellipse":
        radii = shape["rx"], shape["ry"]
        return [_ellipse(shape["cx"], shape["cy"], *radii, float(shape.get("theta", 0)))]
    raise DataError(f"a {kind} has no area; draw a polygon, rect, circle or ellipse")


def _from_via(content: dict) -> dict:
    made = _Translation()
    for entry in content.values():
        name = entry["filename"]
        about = entry.get("file_attributes")
        about = about if isinstance(about, dict) else {}
        texts = {f"file_attributes {key}": value for key, value in about.items()}
        made.images.append(texts | {"id": name, "file_name": name})
        regions = entry["regions"]
        for key, region in regions.items() if isinstance(regions, dict) else enumerate(regions):
            region = region if isinstance(region, dict) else {}
            label = _via_label(region.get("region_attributes"))
            shape: Any = region.get("shape_attributes")
            made.add(name, f"region {key}", label, partial(_via_shape, shape))
    return made.content()


def _is_datumaro(content: Any) -> bool:
    is_dict = isinstance(content, dict) and isinstance(content.get("categories"), dict)
    return is_dict and isinstance(content.get("items"), list)


def _datumaro_shape(entry: dict) -> Any:
    kind = entry.get("type")
    if kind == "polygon":
        return [[float(value) for value in entry["points"]]]
    if kind == "mask":
        return entry["rle"]
    if kind == "ellipse":
        x0, y0, x1, y1 = entry["points"]
        return [_ellipse((x0 + x1) / 2, (y0 + y1) / 2, abs(x1 - x0) / 2, abs(y1 - y0) / 2)]
    hint = "; python -m utils.boxes_to_masks makes masks of boxes" if kind == "bbox" else ""
    raise DataError(f"a {kind} has no mask; draw a polygon, mask or ellipse{hint}")


def _from_datumaro(content: dict) -> dict:
    labels = content["categories"].get("label", {}).get("labels", [])
    made = _Translation([str(label.get("name")) for label in labels])
    for item in content["items"]:
        media = item.get("image") or item.get("media") or {}
        name = media.get("path") or str(item.get("id"))
        image = {"id": item.get("id", name), "file_name": name}
        if isinstance(size := media.get("size"), list) and len(size) == 2:
            image |= {"height": size[0], "width": size[1]}
        captions = [e.get("caption") for e in item["annotations"] if e.get("type") == "caption"]
        made.images.append(image | ({"annotation of type caption": captions} if captions else {}))
        for number, entry in enumerate(item["annotations"]):
            if entry.get("type") in ("caption", "label"):
                continue  # about the whole image
            index = entry.get("label_id")
            is_known = type(index) is int and 0 <= index < len(labels)
            label = made.labels[index] if is_known else None
            made.add(
                image["id"],
                f"annotation {entry.get('id', number)}",
                label,
                partial(_datumaro_shape, entry),
            )
            attributes = entry.get("attributes") or {}
            made.annotations[-1]["iscrowd"] = int(attributes.get("is_crowd") is True)
            # Datumaro counts annotations anew in every item, and several may have one number.
            made.annotations[-1]["id"] += f" ({number})"
    return made.content()


def is_supervisely(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and isinstance(content.get("objects"), list)
        and isinstance(content.get("size"), dict)
    )


def _supervisely_shape(thing: dict, size: tuple[int, int]) -> Any:
    kind = thing.get("geometryType") or ("bitmap" if thing.get("bitmap") else "polygon")
    points = thing.get("points") or {}
    outer = points.get("exterior") or []
    flat = [float(value) for point in outer for value in point]
    if kind == "rectangle":
        (x0, y0), (x1, y1) = outer
        return [_box(x0, y0, x1 - x0, y1 - y0)]
    if kind == "polygon":
        holes = [[float(v) for point in hole for v in point] for hole in points.get("interior", [])]
        if not holes:
            return [flat]
        mask = annotation_mask([flat], size, "its", "exterior")
        return encode_rle(mask & ~annotation_mask(holes, size, "its", "interior"))
    if kind == "bitmap":
        x, y = thing["bitmap"]["origin"]
        packed = base64.b64decode(thing["bitmap"]["data"])
        raw = zlib.decompressobj().decompress(packed, 1 << 28)
        picture = Image.open(io.BytesIO(raw), formats=["PNG"])
        height, width = picture.height, picture.width
        if min(x, y) < 0 or y + height > size[0] or x + width > size[1]:
            raise DataError("its bitmap leaves the image")
        drawn = np.array(picture)
        drawn = drawn[..., -1] if drawn.ndim == 3 else drawn
        mask = np.zeros(size, dtype=bool)
        mask[y : y + height, x : x + width] = drawn > 0
        return encode_rle(mask)
    raise DataError(f"a {kind} has no area; draw a polygon, rectangle or bitmap")


def read_supervisely(folder: Path, faults: Faults, dataset: str, split: str) -> Iterator[OwnQuery]:
    """The queries of a folder ann/, which has a JSON for every photo: a.jpg.json for a.jpg."""
    for path in list_files(folder, (".json",)):
        if faults.skips(dataset, path):
            continue
        with faults.guard(dataset, path), blame(path):
            record = read_json(path)
            if not is_supervisely(record):
                raise DataError(f'{path}: has no "objects" and "size"; Supervisely\'s are expected')
            size = record["size"].get("height"), record["size"].get("width")
            if any(type(side) is not int or side < 1 for side in size):
                raise DataError(f'{path}: "size" must have "height" and "width" in pixels')
            made = _Translation()
            image = {"id": path.stem, "file_name": path.stem, "height": size[0], "width": size[1]}
            made.images.append(image | {"split": split, "description": record.get("description")})
            for number, thing in enumerate(record["objects"]):
                thing = thing if isinstance(thing, dict) else {}
                made.add(
                    path.stem,
                    f"object {number}",
                    thing.get("classTitle"),
                    partial(_supervisely_shape, thing, size),
                )
            yield from read_coco(path, made.content(), faults, dataset)


def is_one_set(content: Any) -> bool:
    """Whether a JSON file is about many images, in a form that is read or whose export has another
    one that is."""
    is_foreign = isinstance(content, list) and bool(tool_of(content))
    return is_coco(content) or _translator(content) is not None or is_foreign


def _translator(content: Any) -> Callable[[Any], dict] | None:
    if isinstance(content, dict) and isinstance(content.get("_via_img_metadata"), dict):
        return lambda project: _from_via(project["_via_img_metadata"])
    if _is_via(content):
        return _from_via
    return _from_datumaro if _is_datumaro(content) else None


def as_coco(path: Path, content: Any) -> dict:
    """The content of a JSON file about many images in COCO's format. Raises DataError that says
    what to export instead."""
    if is_coco(content):
        return content
    if translate := _translator(content):
        try:
            return translate(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{path}: is not as its tool writes it ({type(error).__name__}: {error}); export it"
                " again, in COCO's format"
            ) from None
    raise DataError(
        f'{path}: has no lists "images" and "annotations"; a file in COCO\'s format is expected'
        f" here{tool_of(content)}"
    )


# What the first entry of a JSON has in a tool's own format, and how to export from that tool.
_TOOLS: tuple[tuple[set[str], str], ...] = (
    ({"data", "annotations"}, "Label Studio's own JSON: export it as COCO"),
    ({"data", "completions"}, "Label Studio's own JSON: export it as COCO"),
    ({"data_row"}, "Labelbox's own JSON: convert it to COCO with Labelbox's SDK"),
    ({"item", "annotations"}, "V7's Darwin JSON: export it as COCO"),
    ({"metadata", "instances"}, "SuperAnnotate's own JSON: export it as COCO"),
    ({"dataset", "samples"}, "Segments.ai's release: export it as COCO instance"),
    ({"project", "config", "attribute", "file"}, "a project of VIA 3: use VIA 2, or export COCO"),
    (
        {"image_id", "category_id", "segmentation"},
        "a list of results: give the file of annotations",
    ),
    ({"image_id", "category_id", "bbox"}, "a list of detections: boxes have no masks"),
    ({"image", "annotations"}, "CreateML's JSON: export it as COCO Segmentation"),
    ({"name", "labels"}, "Scalabel's JSON: convert it to COCO"),
)


def tool_of(content: Any) -> str:
    """How to export what a tool has written in a form of its own; "" if it is not known."""
    first = content[0] if isinstance(content, list) and content else content
    fields = set(first) if isinstance(first, dict) else set()
    if {"shapes"} & fields or is_supervisely(first):
        return ""
    return next((f". It looks like {how}" for known, how in _TOOLS if known <= fields), "")


def advice(folder: Path) -> str:
    """What to do about a folder without data that are read, from what lies in it; "" if that is
    not known."""
    names = {base_name(str(path)).lower() for path in folder.rglob("*") if path.is_file()}
    endings = {Path(name).suffix for name in names}
    if names & {"data.yaml", "data.yml", "classes.txt", "obj.names"}:
        return ". It looks like an export for YOLO: export it as COCO (Roboflow: COCO Segmentation)"
    if "annotations.xml" in names:
        return '. It looks like "CVAT for images": export it as COCO 1.0'
    if ".xml" in endings:
        return ". It looks like Pascal VOC, whose boxes have no masks: export it as COCO"
    for ending, how in (
        (".zip", "unpack the archive here"),
        (".ndjson", "export it as COCO instead of NDJSON"),
        (".tfrecord", "export it as COCO instead of TFRecord"),
    ):
        if ending in endings:
            return f"; {how}"
    return ""

"""The three forms in which your own data may come, read into one kind of query; dataset/own.py makes samples of them.

A reader checks every field. Its errors name the file, the place in it, the field and what would be right, and concern one item: a
line of a table, an annotation, a JSON. They are handed to ``Faults.guard``, so that the rest of the file can still be used.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

from dataset.coco import LARGEST
from dataset.faults import Faults, blame
from dataset.images import IMAGE_SUFFIXES, DataError, list_files, read_json, read_text
from dataset.own_arrow import PARQUET, Cell, rows

TEXT_KEYS = ("query", "caption", "expression")
CIRCLE_POINTS = 72
LOSSLESS = (b"\x89PNG", b"II*\0", b"MM\0*")  # how PNG and TIFF begin; datasets stores masks without a file of their own as either
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

    A shape is one of ("polygons", flat lists), ("rle", {"size", "counts"}), ("png", file name), ("labelme", one shape), and, alone
    as a target, ("painted", shapes with targets and ignored regions among them).
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


# ---------------------------------------------------------------------------------------------------------------- fields


def texts_of(value: Any, where: str, name: str) -> list[str]:
    """One text or several wordings as a list, each in one line. Raises DataError."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or any(not isinstance(t, str) or not t.strip() for t in texts):
        raise DataError(f'{where}: "{name}" must be a text, or a list of wordings, none of them empty')
    return [" ".join(text.split()) for text in texts]


def _optional(entry: dict, name: str, kind: type, where: str, what: str) -> Any:
    value = entry.get(name)
    if value is not None and not (isinstance(value, kind) and (kind is not str or value.strip())):
        raise DataError(f'{where}: "{name}" must be {what}, or be left out')
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def polygons_of(value: Any, where: str, name: str) -> list[list[float]]:
    """Polygons, each [x0, y0, x1, y1, …] or [[x, y], …], as flat lists; a single one may stand alone. Raises DataError."""
    wanted = f'{where}: "{name}" must be a list of polygons [x0, y0, x1, y1, …] or [[x, y], …] in pixels'
    if not isinstance(value, list):
        raise DataError(wanted)
    is_point = [isinstance(v, list) and len(v) == 2 and all(map(_is_number, v)) for v in value]
    alone = value and (_is_number(value[0]) or is_point[0])
    flat = []
    for number, polygon in enumerate([value] if alone else value):
        if not isinstance(polygon, list):
            raise DataError(wanted)
        nested = any(isinstance(point, list) for point in polygon)
        numbers = [x for point in polygon for x in (point if isinstance(point, list) else [point])]
        if not all(map(_is_number, numbers)) or (nested and any(not isinstance(p, list) or len(p) != 2 for p in polygon)):
            raise DataError(f"{wanted}; polygon {number} holds something that is no coordinate")
        if len(numbers) < 6 or len(numbers) % 2:
            raise DataError(f'{where}: "{name}": polygon {number} needs at least three points, each an x and a y')
        flat.append([float(x) for x in numbers])
    return flat


def _rle_of(value: Any, where: str, name: str) -> dict:
    size = value.get("size") if isinstance(value, dict) else None
    if not isinstance(size, list) or len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
        raise DataError(f'{where}: "{name}" must be {{"size": [height, width], "counts": …}}')
    counts = value.get("counts")
    counts = counts.decode("latin-1") if isinstance(counts, bytes) else counts  # as pycocotools gives them to an Arrow table
    if not isinstance(counts, (str, list)):
        raise DataError(f'{where}: "{name}" needs "counts", a text or a list of runs')
    return {"size": size, "counts": counts}


def _png_of(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'{where}: "{name}" must be the name of a PNG')
    if isinstance(value, Cell):
        if not value.open().read(4).startswith(LOSSLESS):
            raise DataError(f'{where}: "{name}" is no PNG; a mask must be one (other formats change pixels)')
        return value
    if not value.lower().endswith(".png"):
        raise DataError(f'{where}: "{name}" is {value!r}; a mask must be a PNG (other formats change pixels)')
    return value


SHAPE_COLUMNS = {"mask": ("png", _png_of), "rle": ("rle", _rle_of), "polygons": ("polygons", polygons_of)}


def _shapes_of(entry: dict, where: str, prefix: str = "") -> list[tuple[str, Any]]:
    """The one of mask, rle and polygons that ``entry`` has. Raises DataError for none and for several."""
    given = [name for name in SHAPE_COLUMNS if entry.get(name) is not None]
    if len(given) != 1:
        found = f"{' and '.join(given)} are" if given else "none is"
        raise DataError(f"{where}: {prefix}needs one of mask, rle and polygons, {found} given (for an empty target: polygons [])")
    kind, read = SHAPE_COLUMNS[given[0]]
    value = read(entry[given[0]], where, prefix + given[0])
    return [] if kind == "polygons" and not value else [(kind, value)]


# ----------------------------------------------------------------------------------------------------------------- table


def read_table(path: Path, faults: Faults, dataset: str) -> Iterator[Query]:
    """The rows of a JSONL or CSV file or an Arrow table (dataset/own_arrow.py). CSV holds lists and objects as JSON in a cell; an
    empty cell is no value."""
    seen: dict[str, str] = {}
    for item, place, read in rows(path) if path.is_dir() or path.suffix == PARQUET else _lines(path):
        if faults.skips(dataset, item):
            continue
        with faults.guard(dataset, item):
            row = read()
            query = _row(row, item)
            same = json.dumps([query.image, query.texts, query.targets, query.split], sort_keys=True)
            if same in seen:
                raise DataError(f"{item}: repeats {seen[same]}; remove one of the two")
            seen[same] = place
            yield query


def _lines(path: Path) -> Iterator[tuple[str, str, Callable[[], dict]]]:
    """As ``rows`` has it, of a text file."""
    for number, read in _rows(path):
        yield f"{path}:{number}", f"line {number}", read


def _rows(path: Path) -> Iterator[tuple[int, Callable[[], dict]]]:
    """(line number, function that reads the row) for every row."""
    text = read_text(path)
    if path.suffix == ".csv":
        yield from _csv_rows(path, text)
        return
    # not splitlines: JSON may hold U+2028 and its kin as they are
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, partial(_json_row, line, f"{path}:{number}")


def _json_row(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); a JSONL file has one object per line") from None
    if not isinstance(row, dict):
        raise DataError(f'{where}: must be an object {{"image": …, "query": …, …}}')
    return row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Callable[[], dict]]]:
    csv.field_size_limit(2**31 - 1)  # run lengths and polygons exceed the 131,072 characters of Python's default
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header, end = None, 0
    while True:
        start = end + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}:{start}: not valid CSV ({error}); quote texts with commas, double the quotes in them"
            ) from None
        end = reader.line_num
        if header is None:
            header = [name.strip() for name in cells]
            if len(set(header)) != len(header) or not {"image", "query"} <= set(header):
                raise DataError(f'{path}:{start}: the first line must name the columns, each once, "image" and "query" among them')
        elif cells:
            yield start, partial(_csv_row, header, cells, f"{path}:{start}")


def _csv_row(header: list[str], cells: list[str], where: str) -> dict:
    if len(cells) != len(header):
        raise DataError(f"{where}: has {len(cells)} cells, the first line has {len(header)} columns")
    row: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()}
    for name in ("rle", "polygons", "targets", "ignore", "query", "is_sentence"):
        cell = row.get(name, "").strip()
        if cell and (name in ("rle", "polygons", "targets") or cell[0] in "[{" or name == "is_sentence"):
            try:
                row[name] = json.loads(cell.lower() if name == "is_sentence" else cell)
            except (ValueError, RecursionError) as error:
                raise DataError(f'{where}: "{name}" is not valid JSON ({error})') from None
    return row


def _row(row: dict, where: str) -> Query:
    image = row.get("image")
    if not isinstance(image, str) or not image.strip():
        raise DataError(f'{where}: "image" must be the name of an image; a row has image, query and one of mask, rle and polygons')
    texts = texts_of(row.get("query"), where, "query")
    return Query(
        item=where,
        image=image,
        texts=texts,
        targets=_targets(row, where),
        ignore=[] if row.get("ignore") is None else _ignore(row["ignore"], where),
        answer=_optional(row, "answer", str, where, "a text"),
        is_sentence=_optional(row, "is_sentence", bool, where, "true or false"),
        split=_optional(row, "split", str, where, "a text") or "train",
    )


def _targets(row: dict, where: str) -> list[list[tuple[str, Any]]]:
    targets = row.get("targets")
    if targets is None:
        return [_shapes_of(row, where)]
    if not isinstance(targets, list) or not targets or any(not isinstance(target, dict) for target in targets):
        raise DataError(
            f'{where}: "targets" must be a list of objects with mask, rle or polygons (for an empty target: polygons [])'
        )
    if any(row.get(name) is not None for name in SHAPE_COLUMNS):
        raise DataError(f'{where}: has "targets" and a mask, rle or polygons beside them; give one of the two')
    return [_shapes_of(target, where, f"targets[{number}] ") for number, target in enumerate(targets)]


def _ignore(value: Any, where: str) -> list[tuple[str, Any]]:
    """A PNG's name, run lengths or polygons: what they are is seen from them."""
    name = "mask" if isinstance(value, str) else "rle" if isinstance(value, dict) else "polygons"
    kind, read = SHAPE_COLUMNS[name]
    return [(kind, read(value, where, "ignore"))]


# --------------------------------------------------------------------------------------------------------------- labelme


def read_labelme(folder: Path, faults: Faults, dataset: str, split: str) -> Iterator[Query]:
    """The labelme JSONs of a folder. With "text" a JSON is one query about its targets, otherwise every label is a query."""
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
    image = _optional(record, "image", str, str(path), "a file name") or _labelme_image(record, path)
    shapes = [_labelme_shape(shape, f'{path}: "shapes"[{number}]') for number, shape in enumerate(record["shapes"])]
    common = {"image": image, "split": split, "size": size}
    if "text" in record:
        texts = texts_of(record["text"], str(path), "text")
        answer = _optional(record, "answer", str, str(path), "a text")
        is_sentence = _optional(record, "is_sentence", bool, str(path), "true or false")
        if any(shape and "mask" in shape for shape in shapes):
            raise DataError(f'{path}: with "text" every shape must be drawn as a polygon, rectangle or circle, one is a mask')
        painted = [("painted", [shape for shape in shapes if shape is not None])]
        return [Query(str(path), texts=texts, targets=[painted], answer=answer, is_sentence=is_sentence, **common)]
    ignored = [("labelme", shape) for shape in shapes if shape and shape["label"].lower() in ("ignore", "__ignore__")]
    labels: dict[str, list] = {}
    for shape in shapes:
        if shape and shape["label"].lower() not in ("ignore", "__ignore__"):
            labels.setdefault(" ".join(shape["label"].split()), []).append(("labelme", shape))
    if not labels:
        raise DataError(f'{path}: has no shape to ask for; draw one, or add "text" for a query about nothing')
    return [Query(str(path), texts=[with_article(t)], targets=[s], ignore=ignored, **common) for t, s in labels.items()]


def _labelme_size(record: dict, path: Path) -> tuple[int, int] | None:
    size = record.get("imageHeight"), record.get("imageWidth")
    if size == (None, None):
        return None
    if any(type(n) is not int or n < 1 for n in size):
        raise DataError(f'{path}: "imageHeight" and "imageWidth" must be whole numbers of pixels, or be left out')
    return size


def _labelme_image(record: dict, path: Path) -> str:
    """Name of the image. labelme writes the way from the JSON to it, on Windows with backslashes; the way is not followed."""
    name = _optional(record, "imagePath", str, str(path), "a file name")
    if name is not None:
        return PureWindowsPath(name).name
    return next((path.stem + s for s in IMAGE_SUFFIXES if path.with_suffix(s).is_file()), f"{path.stem}.jpg")


def _labelme_shape(shape: Any, where: str) -> dict | None:
    """{"label", "points"} of a shape, polygons all of them, or {"label", "points", "mask"}; None for "flag" and background."""
    if not isinstance(shape, dict) or not isinstance(shape.get("label"), str) or not shape["label"].strip():
        raise DataError(f'{where}: has no text "label"')
    if shape["label"].lower() in ("flag", "_background_"):
        return None
    kind = shape.get("shape_type") or "polygon"
    if kind not in ("polygon", "rectangle", "circle", "mask"):
        raise DataError(f'{where}: "shape_type" {kind!r} has no area; draw a polygon, rectangle, circle or mask')
    points = shape.get("points")
    if not isinstance(points, list) or any(not isinstance(p, list) or len(p) != 2 or not all(map(_is_number, p)) for p in points):
        raise DataError(f'{where}: needs "points" as a list of [x, y] in pixels')
    if not points or (kind != "polygon" and len(points) != 2):
        raise DataError(f"{where}: a {kind} has {'at least 1 point' if kind == 'polygon' else '2 points'}, found {len(points)}")
    if kind == "mask":
        return {"label": shape["label"], "points": points, "mask": _labelme_mask(shape.get("mask"), where)}
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
    return [[round(x0 + radius * math.cos(a)), round(y0 + radius * math.sin(a))] for a in angles]  # cutting would shift it


def _labelme_mask(value: Any, where: str) -> str:
    try:
        if base64.b64decode(value, validate=True)[:4] == b"\x89PNG":
            return value
    except (TypeError, ValueError):
        pass
    raise DataError(f'{where}: "mask" must be a PNG in base64')


def with_article(text: str) -> str:
    """ "dog" -> "the dog"; what begins with a determiner or is a sentence stays as it is."""
    return text if text[-1] in ".?!" or text.split()[0].lower() in DETERMINERS else f"the {text}"


# ------------------------------------------------------------------------------------------------------------------ coco


def is_coco(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(content.get(key), list) for key in ("images", "annotations"))


def read_coco(path: Path, content: dict, faults: Faults, dataset: str) -> Iterator[Query]:
    """Queries of a COCO file: a text of the annotation, else one of its image, else the category's name; equal ones are joined."""
    categories = _categories(content, path)
    images = _images(content, path, faults, dataset)
    by_image = _annotations(content, path, images, categories, faults, dataset)
    for number, image in images.items():
        yield from _coco_queries(path, number, image, by_image.get(number, []))


def _entries(entries: list, singular: str, path: Path) -> Iterator[tuple[str, Any]]:
    """(name for errors and skip lists, entry) pairs. The name has the id, or the position where that is no name."""
    seen = set()
    for position, entry in enumerate(entries):
        number = entry.get("id") if isinstance(entry, dict) else None
        is_name = type(number) is int and number not in seen
        yield f"{path}:{singular} {number if is_name else f'at position {position}'}", entry
        if is_name:
            seen.add(number)


def _identity(entry: Any, where: str, seen: Any) -> int:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: must be an object")
    if type(entry.get("id")) is not int:
        raise DataError(f'{where}: "id" must be a whole number')
    if entry["id"] in seen:
        raise DataError(f'{where}: "id" is used twice; give each its own')
    return entry["id"]


def _categories(content: dict, path: Path) -> dict[int, str]:
    entries = content.get("categories", [])
    if not isinstance(entries, list):
        raise DataError(f'{path}: "categories" must be a list of {{"id", "name"}}')
    found: dict[int, str] = {}
    for where, entry in _entries(entries, "category", path):
        number = _identity(entry, where, found)
        found[number] = texts_of(entry.get("name"), where, "name")[0]
    return found


def _images(content: dict, path: Path, faults: Faults, dataset: str) -> dict[int, dict]:
    found: dict[int, dict] = {}
    for item, entry in _entries(content["images"], "image", path):
        if faults.skips(dataset, item):
            continue
        with faults.guard(dataset, item):
            number = _identity(entry, item, found)
            if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
                raise DataError(f'{item}: "file_name" must be the name of an image')
            size = entry.get("height"), entry.get("width")
            if size != (None, None) and any(type(n) is not int or n < 1 for n in size):
                raise DataError(f'{item}: "height" and "width" must be whole numbers of pixels, or be left out')
            _coco_texts(entry, item)
            for name in ("split", "answer"):
                _optional(entry, name, str, item, "a text")
            _optional(entry, "is_sentence", bool, item, "true or false")
            found[number] = entry
    return found


def _annotations(
    content: dict, path: Path, images: dict[int, dict], categories: dict[int, str], faults: Faults, dataset: str
) -> dict[int, list[dict]]:
    """Image id -> its annotations, checked; each with "item" and "shapes"."""
    known = {entry.get("id") for entry in content["images"] if isinstance(entry, dict) and type(entry.get("id")) is int}
    seen: set[int] = set()
    found: dict[int, list[dict]] = {}
    for item, entry in _entries(content["annotations"], "annotation", path):
        if faults.skips(dataset, item):
            continue
        with faults.guard(dataset, item):
            number = _identity(entry, item, seen)
            seen.add(number)
            image = entry.get("image_id")
            if type(image) is not int or image not in known:
                raise DataError(f'{item}: "image_id" is {image!r}, and there is no such image')
            checked = _annotation(entry, item, categories, bool(_coco_texts(images.get(image, {}), item)))
            if image in images:  # else its image is bad or skipped, and goes with all its annotations
                found.setdefault(image, []).append(checked)
    return found


def _annotation(entry: dict, item: str, categories: dict[int, str], image_has_texts: bool) -> dict:
    texts, category = _coco_texts(entry, item), entry.get("category_id")
    if category is not None and (type(category) is not int or category not in categories):
        raise DataError(f'{item}: "category_id" is {category!r}, and there is no such category')
    if not texts and not image_has_texts and category is None:
        raise DataError(f"{item}: nothing to ask: give it a category_id, or a query, caption or expression")
    if entry.get("iscrowd", 0) not in (0, 1):
        raise DataError(f'{item}: "iscrowd" must be 0 or 1')
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, dict):
        shapes = [("rle", _rle_of(segmentation, item, "segmentation"))]
    else:
        polygons = polygons_of(segmentation, item, "segmentation")
        shapes = [("polygons", polygons)] if polygons else []
        if not polygons and _has_area(entry.get("bbox")):
            raise DataError(
                f'{item}: has a "bbox" but an empty "segmentation"; python -m utils.boxes_to_masks makes masks of boxes'
            )
    return {
        "item": item,
        "texts": texts or ([] if image_has_texts else [with_article(categories[category])]),
        "shapes": shapes,
        "crowd": entry.get("iscrowd") == 1,
        "answer": _optional(entry, "answer", str, item, "a text"),
        "is_sentence": _optional(entry, "is_sentence", bool, item, "true or false"),
    }


def _has_area(bbox: Any) -> bool:
    """Detectors' files have boxes alone, which must not pass for empty targets."""
    return isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_number, bbox)) and bbox[2] > 0 and bbox[3] > 0


def _coco_texts(entry: dict, where: str) -> list[str]:
    given = [name for name in TEXT_KEYS if entry.get(name) is not None]
    if len(given) > 1:
        raise DataError(f"{where}: has {' and '.join(given)}; give one of them, as a list if there are several wordings")
    return texts_of(entry[given[0]], where, given[0]) if given else []


def _coco_queries(path: Path, number: int, image: dict, annotations: list[dict]) -> Iterator[Query]:
    """One query for each different text; what belongs to the image's own text comes first."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    own_texts = tuple(_coco_texts(image, f"{path}:image {number}"))
    if own_texts:
        groups[own_texts] = []
    for entry in annotations:
        groups.setdefault(tuple(entry["texts"]) or own_texts, []).append(entry)
    size = (image["height"], image["width"]) if image.get("height") else None
    for texts, entries in groups.items():
        objects = [e for e in entries if not e["crowd"]]
        if not objects and texts != own_texts:
            continue  # only a crowd: nothing that could be asked for
        source = image if texts == own_texts else objects[0]
        yield Query(
            item=objects[0]["item"] if len(objects) == 1 else f"{path}:image {number}",
            image=image["file_name"],
            texts=list(texts),
            targets=[[shape for e in objects for shape in e["shapes"]]],
            ignore=[shape for e in entries if e["crowd"] for shape in e["shapes"]],
            answer=source.get("answer"),
            is_sentence=source.get("is_sentence"),
            split=image.get("split") or "train",
            size=size,
        )

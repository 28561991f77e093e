"""Your own data as one file in COCO's format, with or without texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset.files.errors import DataError
from dataset.files.faults import Faults
from dataset.readers.own.formats import (
    TEXT_KEYS,
    Query,
    is_number,
    optional,
    polygons_of,
    rle_of,
    texts_of,
    with_article,
)

# --------------------------------------------------------------------------------------------- coco


def is_coco(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(content.get(key), list) for key in ("images", "annotations")
    )


def read_coco(path: Path, content: dict, faults: Faults, dataset: str) -> Iterator[Query]:
    """Queries of a COCO file: a text of the annotation, else one of its image, else the category's
    name; equal ones are joined."""
    categories = _categories(content, path)
    images = _images(content, path, faults, dataset)
    by_image = _annotations(content, path, images, categories, faults, dataset)
    for number, image in images.items():
        yield from _coco_queries(path, number, image, by_image.get(number, []))


def _entries(entries: list, singular: str, path: Path) -> Iterator[tuple[str, Any]]:
    """(name for errors and skip lists, entry) pairs. The name has the id, or the position where
    that is no name."""
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
                raise DataError(
                    f'{item}: "height" and "width" must be whole numbers of pixels, or be left out'
                )
            _coco_texts(entry, item)
            for name in ("split", "answer"):
                optional(entry, name, str, item, "a text")
            optional(entry, "is_sentence", bool, item, "true or false")
            found[number] = entry
    return found


def _annotations(
    content: dict,
    path: Path,
    images: dict[int, dict],
    categories: dict[int, str],
    faults: Faults,
    dataset: str,
) -> dict[int, list[dict]]:
    """Image id -> its annotations, checked; each with "item" and "shapes"."""
    known = {
        entry.get("id")
        for entry in content["images"]
        if isinstance(entry, dict) and type(entry.get("id")) is int
    }
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
            checked = _annotation(
                entry, item, categories, bool(_coco_texts(images.get(image, {}), item))
            )
            # else its image is bad or skipped, and goes with all its annotations
            if image in images:
                found.setdefault(image, []).append(checked)
    return found


def _annotation(entry: dict, item: str, categories: dict[int, str], image_has_texts: bool) -> dict:
    texts, category = _coco_texts(entry, item), entry.get("category_id")
    if category is not None and (type(category) is not int or category not in categories):
        raise DataError(f'{item}: "category_id" is {category!r}, and there is no such category')
    if not texts and not image_has_texts and category is None:
        raise DataError(
            f"{item}: nothing to ask: give it a category_id, or a query, caption or expression"
        )
    if entry.get("iscrowd", 0) not in (0, 1):
        raise DataError(f'{item}: "iscrowd" must be 0 or 1')
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, dict):
        shapes = [("rle", rle_of(segmentation, item, "segmentation"))]
    else:
        polygons = polygons_of(segmentation, item, "segmentation")
        shapes = [("polygons", polygons)] if polygons else []
        if not polygons and _has_area(entry.get("bbox")):
            raise DataError(
                f'{item}: has a "bbox" but an empty "segmentation"; python -m utils.boxes_to_masks'
                " makes masks of boxes"
            )
    return {
        "item": item,
        "texts": texts or ([] if image_has_texts else [with_article(categories[category])]),
        "shapes": shapes,
        "crowd": entry.get("iscrowd") == 1,
        "answer": optional(entry, "answer", str, item, "a text"),
        "is_sentence": optional(entry, "is_sentence", bool, item, "true or false"),
    }


def _has_area(bbox: Any) -> bool:
    """Detectors' files have boxes alone, which must not pass for empty targets."""
    return (
        isinstance(bbox, list)
        and len(bbox) == 4
        and all(map(is_number, bbox))
        and bbox[2] > 0
        and bbox[3] > 0
    )


def _coco_texts(entry: dict, where: str) -> list[str]:
    given = [name for name in TEXT_KEYS if entry.get(name) is not None]
    if len(given) > 1:
        raise DataError(
            f"{where}: has {' and '.join(given)}; give one of them, as a list if there are several"
            " wordings"
        )
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

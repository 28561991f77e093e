"""A user's own data as one file in COCO's format, with or without texts."""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from dataset.annotations.shapes import polygons_of, refuse_boxes, rle_of
from dataset.files.errors import DataError
from dataset.files.faults import Faults
from dataset.files.images import claimed_size
from dataset.readers.own.formats import (
    TEXT_KEYS,
    OwnQuery,
    Shape,
    optional_field,
    with_article,
    wordings_of,
)


def is_coco(content: Any) -> bool:
    """Whether the content of a JSON file is in COCO's format."""
    return isinstance(content, dict) and all(
        isinstance(content.get(key), list) for key in ("images", "annotations")
    )


def read_coco(path: Path, content: dict, faults: Faults, dataset: str) -> Iterator[OwnQuery]:
    """The queries of a COCO file. An annotation is asked for by its own text, or else by that of
    its image, or else by its category's name. Annotations with equal texts are one query."""
    categories = _categories(content, path)
    images = _images(content, path, faults, dataset)
    by_image = _annotations(content, path, images, categories, faults, dataset)
    for number, image in images.items():
        yield from _queries_of(path, number, image, by_image.get(number, []))


def _entries(entries: list, singular: str, path: Path) -> Iterator[tuple[str, Any]]:
    """(item, entry) pairs. The item names the entry in errors and skip lists by its id, or by its
    position where the id is missing or used before."""
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        number: Any = entry.get("id") if isinstance(entry, dict) else None
        is_name = type(number) is int and number not in seen
        yield f"{path}:{singular} {number if is_name else f'at position {position}'}", entry
        if is_name:
            seen.add(number)


def _new_id(entry: Any, where: str, seen: Container[int]) -> int:
    """The id of an entry. Raises DataError if it has none or one that was ``seen``."""
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
        number = _new_id(entry, where, found)
        found[number] = wordings_of(entry.get("name"), where, "name")[0]
    return found


def _images(content: dict, path: Path, faults: Faults, dataset: str) -> dict[int, dict]:
    found: dict[int, dict] = {}
    for item, entry in _entries(content["images"], "image", path):
        if faults.skips(dataset, item):
            continue
        with faults.guard(dataset, item):
            number = _new_id(entry, item, found)
            if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
                raise DataError(f'{item}: "file_name" must be the name of an image')
            claimed_size(entry, item)
            _texts_of(entry, item)
            for name in ("split", "answer"):
                optional_field(entry, name, str, item, "a text")
            optional_field(entry, "is_sentence", bool, item, "true or false")
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
    """Image id -> what ``_annotation`` makes of each of its annotations."""
    known = {
        entry.get("id")
        for entry in content["images"]
        if isinstance(entry, dict) and type(entry.get("id")) is int
    }
    seen: set[int] = set()
    found: dict[int, list[dict]] = {}
    for item, entry in _entries(content["annotations"], "annotation", path):
        image: Any = entry.get("image_id") if isinstance(entry, dict) else None
        has_image = type(image) is int and image in images
        image_has_texts = has_image and bool(_texts_of(images[image], item))
        checked = None
        if not faults.skips(dataset, item):
            with faults.guard(dataset, item):
                number = _new_id(entry, item, seen)
                seen.add(number)
                if type(image) is not int or image not in known:
                    raise DataError(f'{item}: "image_id" is {image!r}, and there is no such image')
                checked = _annotation(entry, item, categories, image_has_texts)
        # An image that is bad or skipped takes its annotations along.
        if has_image:
            checked = checked or _lost(entry, item, categories, image_has_texts)
            found.setdefault(image, []).append(checked)
    return found


def _asked_texts(
    entry: dict, item: str, categories: dict[int, str], image_has_texts: bool
) -> list[str]:
    """What is asked for an annotation; nothing if it is asked for by the text of its image. Raises
    DataError."""
    texts, category = _texts_of(entry, item), entry.get("category_id")
    if category is not None and (type(category) is not int or category not in categories):
        raise DataError(f'{item}: "category_id" is {category!r}, and there is no such category')
    if texts or image_has_texts:
        return texts
    if category is None:
        raise DataError(
            f"{item}: nothing to ask: give it a category_id, or a query, caption or expression"
        )
    return [with_article(categories[category])]


def _lost(entry: dict, item: str, categories: dict[int, str], image_has_texts: bool) -> dict:
    """Stands for an annotation that cannot be used: "texts" as those of others, or None where they
    cannot be told."""
    try:
        texts = _asked_texts(entry, item, categories, image_has_texts)
    except DataError:
        texts = None
    return {"item": item, "texts": texts, "crowd": False, "is_lost": True}


def _annotation(entry: dict, item: str, categories: dict[int, str], image_has_texts: bool) -> dict:
    """Item, texts (none: those of its image), shapes, whether it is a crowd, answer and is_sentence
    of an annotation. Raises DataError."""
    texts = _asked_texts(entry, item, categories, image_has_texts)
    if entry.get("iscrowd", 0) not in (0, 1):
        raise DataError(f'{item}: "iscrowd" must be 0 or 1')
    refuse_boxes(entry, item)
    segmentation = entry["segmentation"]
    shapes: list[Shape]
    if isinstance(segmentation, dict):
        shapes = [("rle", rle_of(segmentation, item, "segmentation"), item)]
    else:
        polygons = polygons_of(segmentation, item, "segmentation")
        shapes = [("polygons", polygons, item)] if polygons else []
    return {
        "item": item,
        "texts": texts,
        "shapes": shapes,
        "crowd": entry.get("iscrowd") == 1,
        "answer": optional_field(entry, "answer", str, item, "a text"),
        "is_sentence": optional_field(entry, "is_sentence", bool, item, "true or false"),
    }


def _texts_of(entry: dict, where: str) -> list[str]:
    """The wordings that an image or annotation has under one of TEXT_KEYS, or none."""
    given = [name for name in TEXT_KEYS if entry.get(name) is not None]
    if len(given) > 1:
        raise DataError(
            f"{where}: has {' and '.join(given)}; give one of them, as a list if there are several"
            " wordings"
        )
    return wordings_of(entry[given[0]], where, given[0]) if given else []


def _queries_of(
    path: Path, number: int, image: dict, annotations: list[dict]
) -> Iterator[OwnQuery]:
    """One query for each different text, that of the image first."""
    item = f"{path}:image {number}"
    groups: dict[tuple[str, ...], list[dict]] = {}
    image_texts = tuple(_texts_of(image, item))
    if image_texts:
        groups[image_texts] = []
    if any(entry["texts"] is None for entry in annotations):
        return  # A part is missing, and nobody knows of which query.
    for entry in annotations:
        groups.setdefault(tuple(entry["texts"]) or image_texts, []).append(entry)
    for texts, entries in groups.items():
        if any(entry.get("is_lost") for entry in entries):
            continue  # Without a part of its target the query would have a wrong answer.
        objects = [e for e in entries if not e["crowd"]]
        if not objects and texts != image_texts:
            continue  # There is only a crowd, which is no target.
        source = image if texts == image_texts else objects[0]
        yield OwnQuery(
            item=objects[0]["item"] if len(objects) == 1 else item,
            image=image["file_name"],
            texts=list(texts),
            targets=[[shape for e in objects for shape in e["shapes"]]],
            ignore=[shape for e in entries if e["crowd"] for shape in e["shapes"]],
            answer=source.get("answer"),
            is_sentence=source.get("is_sentence"),
            split=image.get("split") or "train",
            size=claimed_size(image, item),
            source=item,
        )

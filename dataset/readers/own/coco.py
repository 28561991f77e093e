"""A user's own data as one file in COCO's format, with or without texts."""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from cores.dataset.annotations.shapes import polygons_of, refuse_boxes, rle_of
from cores.dataset.files.errors import DataError
from cores.dataset.files.faults import Faults
from cores.dataset.files.images import claimed_size
from cores.dataset.files.index import as_id
from cores.dataset.files.lookup import photo_name
from cores.dataset.readers.own.formats import (
    TEXT_KEYS,
    OwnQuery,
    Shape,
    optional_field,
    same_words,
    unread_texts,
    with_article,
    wordings_of,
)
from cores.dataset.readers.questions import readable_names
from cores.dataset.readers.usable import coco_number

FAULT = "fault"
"""The field in which a translated annotation (own/dialects.py) says what is wrong with it."""
COCO_CROWD_IDS = 900_000_000_000  # COCO numbers its crowds by 900, category and image.
# Texts of images and annotations that are read, or are no words to ask.
READ_TEXTS = {*TEXT_KEYS, "file_name", "answer", "split", "date_captured", "license", "path"}
READ_TEXTS |= {"coco_url", "flickr_url", "url", "category_name"}


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
    brushed = _crowds_are_masks(content)
    by_image = _annotations(content, path, images, categories, brushed, faults, dataset)
    for text in _remarks(content, path, brushed):
        faults.remark(dataset, text)
    for number, image in images.items():
        yield from _queries_of(path, number, image, by_image.get(number, []))


def _entries(entries: list, singular: str, path: Path) -> Iterator[tuple[str, Any]]:
    """(item, entry) pairs. The item names the entry in errors and skip lists by its id, or by its
    position where the id is missing or used before."""
    seen: set[int | str] = set()
    for position, entry in enumerate(entries):
        number: Any = as_id(entry.get("id")) if isinstance(entry, dict) else None
        is_name = number is not None and number not in seen
        yield f"{path}:{singular} {number if is_name else f'at position {position}'}", entry
        if is_name:
            seen.add(number)


def _new_id(entry: Any, where: str, seen: Container[int | str]) -> int | str:
    """The id of an entry. Raises DataError if it has none or one that was ``seen``."""
    if not isinstance(entry, dict):
        raise DataError(f"{where}: must be an object")
    number = as_id(entry.get("id"))
    if number is None:
        raise DataError(f'{where}: "id" must be a whole number or a text')
    if number in seen:
        raise DataError(f'{where}: "id" is used twice; give each its own')
    return number


def _categories(content: dict, path: Path) -> dict[int | str, str]:
    entries = content.get("categories", [])
    if not isinstance(entries, list):
        raise DataError(f'{path}: "categories" must be a list of {{"id", "name"}}')
    found: dict[int | str, str] = {}
    for where, entry in _entries(entries, "category", path):
        number = _new_id(entry, where, found)
        found[number] = wordings_of(entry.get("name"), where, "name")[0]
    return readable_names(found)


def _images(content: dict, path: Path, faults: Faults, dataset: str) -> dict[int | str, dict]:
    found: dict[int | str, dict] = {}
    for item, entry in _entries(content["images"], "image", path):
        if faults.skips(dataset, item):
            continue
        with faults.guard(dataset, item):
            number = _new_id(entry, item, found)
            if (name := photo_name(entry)) is None:
                raise DataError(f'{item}: "file_name" must be the name of an image')
            claimed_size(entry, item)
            _texts_of(entry, item)
            for field in ("split", "answer"):
                optional_field(entry, field, str, item, "a text")
            optional_field(entry, "is_sentence", bool, item, "true or false")
            found[number] = entry | {"file_name": name}
    return found


def _annotations(
    content: dict,
    path: Path,
    images: dict[int | str, dict],
    categories: dict[int | str, str],
    brushed: bool,
    faults: Faults,
    dataset: str,
) -> dict[int | str, list[dict]]:
    """Image id -> what ``_annotation`` makes of each of its annotations."""
    known = {as_id(entry.get("id")) for entry in content["images"] if isinstance(entry, dict)}
    seen: set[int | str] = set()
    found: dict[int | str, list[dict]] = {}
    for item, entry in _entries(content["annotations"], "annotation", path):
        image = as_id(entry.get("image_id")) if isinstance(entry, dict) else None
        has_image = image is not None and image in images
        image_has_texts = image is not None and has_image and bool(_texts_of(images[image], item))
        checked = None
        if not faults.skips(dataset, item):
            with faults.guard(dataset, item):
                number = _new_id(entry, item, seen)
                seen.add(number)
                if image is None or image not in known:
                    raise DataError(
                        f'{item}: "image_id" is {entry.get("image_id")!r}, and there is no such'
                        " image"
                    )
                checked = _annotation(entry, item, categories, image_has_texts, brushed)
        # An image that is bad or skipped takes its annotations along.
        if image is not None and has_image:
            if checked and checked["is_shell"] and not image_has_texts:
                faults.remark(dataset, f"{item}: an empty shape of area 0 is not asked")
            checked = checked or _lost(entry, item, categories, image_has_texts)
            found.setdefault(image, []).append(checked)
    return found


def _asked_texts(
    entry: dict, item: str, categories: dict[int | str, str], image_has_texts: bool
) -> list[str]:
    """What is asked for an annotation; nothing if it is asked for by the text of its image. Raises
    DataError."""
    texts, category = _texts_of(entry, item), as_id(entry.get("category_id"))
    if entry.get("category_id") is not None and category not in categories:
        raise DataError(
            f'{item}: "category_id" is {entry["category_id"]!r}, and there is no such category'
        )
    if texts or image_has_texts:
        return texts
    if category is None:
        raise DataError(
            f"{item}: nothing to ask: give it a category_id, or a query, caption or expression"
        )
    return [with_article(categories[category])]


def _lost(entry: dict, item: str, categories: dict[int | str, str], image_has_texts: bool) -> dict:
    """Stands for an annotation that cannot be used: "texts" as those of others, or None where they
    cannot be told."""
    try:
        texts = _asked_texts(entry, item, categories, image_has_texts)
    except DataError:
        texts = None
    return {"item": item, "texts": texts, "crowd": False, "is_shell": False, "is_lost": True}


def _annotation(
    entry: dict,
    item: str,
    categories: dict[int | str, str],
    image_has_texts: bool,
    brushed: bool,
) -> dict:
    """Item, texts (none: those of its image), shapes, whether it is a crowd, answer and is_sentence
    of an annotation. Raises DataError."""
    if FAULT in entry:
        raise DataError(f"{item}: {entry[FAULT]}")
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
    has_texts = bool(_texts_of(entry, item))
    return {
        "item": item,
        "texts": texts,
        "has_texts": has_texts,
        # Tools leave shells of what was deleted; [] and a query means that nothing is there.
        "is_shell": segmentation == [] and entry.get("area") == 0 and not has_texts,
        "shapes": shapes,
        "crowd": entry.get("ignore") == 1 or (entry.get("iscrowd") == 1 and not brushed),
        "answer": optional_field(entry, "answer", str, item, "a text"),
        "is_sentence": optional_field(entry, "is_sentence", bool, item, "true or false"),
    }


def _is_crowd(entry: dict) -> bool:
    return entry.get("iscrowd") == 1


def _crowds_are_masks(content: dict) -> bool:
    """Whether "iscrowd" only says that a mask was drawn with a brush, as CVAT, Datumaro and
    pycococreator write it: all run lengths have it and no polygon. COCO's own files are like that,
    too, but there these are crowds; their numbers and names give them away."""
    entries = [entry for entry in content["annotations"] if isinstance(entry, dict)]
    runs = [entry for entry in entries if isinstance(entry.get("segmentation"), dict)]
    polygons = [entry for entry in entries if isinstance(entry.get("segmentation"), list)]
    if not runs or not all(map(_is_crowd, runs)) or any(map(_is_crowd, polygons)):
        return False
    names = [photo_name(image) or "" for image in content["images"] if isinstance(image, dict)]
    is_coco_number = all(coco_number(name) is not None for name in names)
    has_coco_id = any(
        type(number := as_id(entry.get("id"))) is int and number >= COCO_CROWD_IDS for entry in runs
    )
    return not is_coco_number and not has_coco_id


def _remarks(content: dict, path: Path, brushed: bool) -> Iterator[str]:
    """What a user may not expect: which annotations are no targets, and texts that nobody asks."""
    entries = [entry for entry in content["annotations"] if isinstance(entry, dict)]
    if crowds := sum(map(_is_crowd, entries)):
        yield f"{path.name}: {crowds} annotations have iscrowd 1; " + (
            'as all run lengths have it and no polygon, they are single objects ("ignore": 1 makes'
            " one ignored pixels)"
            if brushed
            else "they are crowds, whose pixels are ignored"
        )
    for key in ("images", "annotations"):
        yield from unread_texts(content[key], READ_TEXTS, f"{path.name}: {key}")


def _texts_of(entry: dict, where: str) -> list[str]:
    """The wordings that an image or annotation has under one of TEXT_KEYS, or none."""
    given = [name for name in TEXT_KEYS if entry.get(name) not in (None, "", [])]
    if len(given) > 1:
        raise DataError(
            f"{where}: has {' and '.join(given)}; give one of them, as a list if there are several"
            " wordings"
        )
    if not given:
        return []
    value = entry[given[0]]
    if isinstance(value, list):  # refCOCO writes [{"sent": "the left dog", …}, …].
        value = [sent.get("sent") if isinstance(sent, dict) else sent for sent in value]
    return wordings_of(value, where, given[0])


def _queries_of(
    path: Path, number: int | str, image: dict, annotations: list[dict]
) -> Iterator[OwnQuery]:
    """One query for each different text, that of the image first."""
    item = f"{path}:image {number}"
    groups: dict[tuple[str, ...], list[dict]] = {}
    spelled: dict[tuple[str, ...], tuple[str, ...]] = {}
    image_texts = tuple(_texts_of(image, item))
    if image_texts:
        groups[spelled.setdefault(same_words(image_texts), image_texts)] = []
    if any(entry["texts"] is None for entry in annotations):
        return  # A part is missing, and nobody knows of which query.
    for entry in annotations:
        texts = tuple(entry["texts"]) or image_texts
        groups.setdefault(spelled.setdefault(same_words(texts), texts), []).append(entry)
    for texts, entries in groups.items():
        if any(entry.get("is_lost") for entry in entries):
            continue  # Without a part of its target the query would have a wrong answer.
        objects = [e for e in entries if not e["crowd"] and not e["is_shell"]]
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
            # Of a category, all objects in the photo are meant, so no other entry may have some.
            entry="" if texts == image_texts or objects[0]["has_texts"] else item,
        )

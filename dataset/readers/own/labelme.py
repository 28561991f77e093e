"""A user's own data as labelme files, one beside each image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from cores.dataset.annotations.shapes import WITHOUT_AREA, hint_of_inline, outline
from cores.dataset.files.errors import DataError
from cores.dataset.files.faults import Faults, blame
from cores.dataset.files.images import IMAGE_SUFFIXES, claimed_size
from cores.dataset.files.lookup import base_name
from cores.dataset.files.paths import list_files
from cores.dataset.files.text import read_json
from cores.dataset.readers.own.dialects import tool_of
from cores.dataset.readers.own.formats import (
    OwnQuery,
    Shape,
    optional_field,
    with_article,
    wordings_of,
)
from cores.dataset.readers.questions import readable_name

IGNORED_LABELS = ("ignore", "__ignore__")


def read_labelme(folder: Path, faults: Faults, dataset: str, split: str) -> Iterator[OwnQuery]:
    """The queries of the labelme JSONs of a folder. A JSON with "text" is one query about its
    targets; in any other, every label is a query."""
    for path in list_files(folder, (".json",)):
        if faults.skips(dataset, path):
            continue
        with faults.guard(dataset, path), blame(path):
            yield from _queries_of(path, split, faults, dataset)


def _queries_of(path: Path, split: str, faults: Faults, dataset: str) -> Iterator[OwnQuery]:
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("shapes"), list):
        raise DataError(
            f'{path}: has no list "shapes"; a JSON of labelme is expected{tool_of(record)}'
        )
    where = str(path)
    size = claimed_size(record, path, "imageHeight", "imageWidth")
    image = optional_field(record, "image", str, where, "a file name") or _image_name(record, path)
    query = partial(
        OwnQuery, image=image, split=split, size=size, source=where, hint=hint_of_inline(record)
    )
    by_label: dict[str, list[tuple[int, dict]]] = {}
    spelled: dict[str, str] = {}
    for number, shape in enumerate(record["shapes"]):
        label = shape.get("label") if isinstance(shape, dict) else None
        if not isinstance(label, str) or not label.strip():
            raise DataError(f'{path}: "shapes"[{number}]: has no text "label"')
        if label.lower() not in ("flag", "_background_"):
            label = " ".join(label.split())
            name = label if label.lower() in IGNORED_LABELS else readable_name(label)
            name = spelled.setdefault(name.casefold(), name)
            by_label.setdefault(name, []).append((number, shape))
    if record.get("text") not in (None, ""):  # Tools of OCR write an empty one.
        texts = wordings_of(record["text"], where, "text")
        explanation = optional_field(record, "answer", str, where, "a text")
        is_sentence = optional_field(record, "is_sentence", bool, where, "true or false")
        shapes = [pair for pairs in by_label.values() for pair in pairs]
        painted = [shape for _, shape in sorted(_checked(shapes, where).items())]
        targets: list[list[Shape]] = [[("painted", painted, where)]]
        yield query(
            where, texts=texts, targets=targets, answer=explanation, is_sentence=is_sentence
        )
        return
    ignored: list[Shape] = []
    for label in [label for label in by_label if label.lower() in IGNORED_LABELS]:
        shapes_of_label = _checked(by_label.pop(label), where)
        ignored += [("labelme", shape, where) for shape in shapes_of_label.values()]
    if not by_label:
        raise DataError(
            f'{path}: has no shape to ask for; draw one, or add "text" for a query about nothing'
        )
    no_area = {label: _kind_without_area(shapes) for label, shapes in by_label.items()}
    drawn = [f"{label!r}: {kind!r} has no area" for label, kind in no_area.items() if kind]
    if len(drawn) == len(by_label):
        raise DataError(f"{path}: has no shape to ask for: {drawn[0]}")
    for text in drawn:
        faults.remark(dataset, f"{path}: {text} and is not asked")
    by_label = {label: shapes for label, shapes in by_label.items() if not no_area[label]}
    for label, shapes_of_this in by_label.items():
        item = f"{path}:label {label}"
        asked = query(item, texts=[with_article(label)], targets=[], ignore=ignored, is_lost=True)
        if not faults.skips(dataset, item):
            with faults.guard(dataset, item), blame(item):
                same_label = _checked(shapes_of_this, item).values()
                targets = [[("labelme", shape, item) for shape in same_label]]
                asked = replace(asked, targets=targets, is_lost=False)
        yield asked


def _kind_without_area(shapes: list[tuple[int, dict]]) -> str | None:
    """The kind of the first shape, if none of the shapes of a label has an area."""
    kinds = [str(shape.get("shape_type")).strip().lower() for _, shape in shapes]
    return kinds[0] if set(kinds) <= set(WITHOUT_AREA) else None


def _checked(shapes: list[tuple[int, dict]], where: str) -> dict[int, dict]:
    """Number -> shape, with what is needed to draw it. Raises DataError."""
    found = {}
    for number, shape in shapes:
        outline(shape, f'{where}: "shapes"[{number}]', least=3)
        found[number] = {
            name: shape.get(name) for name in ("label", "points", "shape_type", "mask")
        }
    return found


def _image_name(record: dict, path: Path) -> str:
    """The name of the image, which is looked for where those of all own data are."""
    name = optional_field(record, "imagePath", str, str(path), "a file name")
    if name is None:
        return path.stem  # of any photo's ending
    beside = [path.stem + suffix for suffix in IMAGE_SUFFIXES if path.with_suffix(suffix).is_file()]
    meant = base_name(name)
    if beside and meant not in beside and (path.parent / meant).is_file():
        raise DataError(
            f'{path}: "imagePath" says {name}, but {beside[0]} has the name of this JSON; correct'
            " the one that was renamed"
        )
    return name

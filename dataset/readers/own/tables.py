"""A user's own data as a table: JSON Lines, CSV, Parquet or a saved Hugging Face dataset."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cores.dataset.annotations.shapes import polygons_of, rle_of
from cores.dataset.files.errors import DataError
from cores.dataset.files.faults import Faults
from cores.dataset.files.text import read_text
from cores.dataset.readers.own.arrow import COLUMNS, PARQUET, arrow_rows
from cores.dataset.readers.own.formats import (
    OwnQuery,
    Shape,
    optional_field,
    png_of,
    unread_texts,
    wordings_of,
)

SHAPE_COLUMNS = {
    "mask": ("png", png_of),
    "rle": ("rle", rle_of),
    "polygons": ("polygons", polygons_of),
}


def _shapes_of(entry: dict, where: str, prefix: str = "") -> list[Shape]:
    """The shape of a target: the one of mask, rle and polygons that ``entry`` has; no shape for
    polygons []. Raises DataError for none and for several."""
    given = [name for name in SHAPE_COLUMNS if entry.get(name) is not None]
    if len(given) != 1:
        found = f"{' and '.join(given)} are" if given else "none is"
        raise DataError(
            f"{where}: {prefix}needs one of mask, rle and polygons, {found} given (for an empty"
            " target: polygons [])"
        )
    kind, read = SHAPE_COLUMNS[given[0]]
    value = read(entry[given[0]], where, prefix + given[0])
    return [] if kind == "polygons" and not value else [(kind, value, where)]


def read_table(path: Path, faults: Faults, dataset: str) -> Iterator[OwnQuery]:
    """The rows of a JSONL or CSV file or an Arrow table (dataset/readers/own/arrow.py). CSV holds
    lists and objects as JSON in a cell; an empty cell is no value."""
    is_arrow = path.is_dir() or path.suffix == PARQUET
    seen: dict[str, str] = {}
    unread: list[dict] = []
    for item, place, read in arrow_rows(path) if is_arrow else _text_rows(path):
        row: dict = {}
        is_used = False
        if not faults.skips(dataset, item):
            with faults.guard(dataset, item):
                row = read()
                unread.append({name: value for name, value in row.items() if name not in COLUMNS})
                query = _query_of(row, item)
                facts = [query.image, query.texts, query.drawn(), query.split]
                key = json.dumps(facts, sort_keys=True)
                if key in seen:
                    raise DataError(f"{item}: repeats {seen[key]}; remove one of the two")
                seen[key] = place
                is_used = True
                yield query
        if not is_used:
            with suppress(DataError):
                yield _lost(row or read(), item)
    for text in unread_texts(unread, (), path.name):
        faults.remark(dataset, text)


def _lost(row: dict, item: str) -> OwnQuery:
    """The query of a row that cannot be used. Raises DataError if the row does not tell which one
    it is."""
    try:
        return replace(_query_of(row, item), is_lost=True)
    except DataError:
        rest = {name: row.get(name) for name in ("image", "query", "split")}
        return replace(_query_of(rest | {"polygons": []}, item), is_lost=True)


def _text_rows(path: Path) -> Iterator[tuple[str, str, Callable[[], dict]]]:
    """As ``arrow_rows``: (item, words for the place, function that reads the row)."""
    text = read_text(path)
    for number, read in (_csv_rows if path.suffix == ".csv" else _json_rows)(path, text):
        yield f"{path}:{number}", f"line {number}", read


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Callable[[], dict]]]:
    # Not splitlines, which would also split at U+2028 and the like inside a JSON text.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, partial(_json_row, line, f"{path}:{number}")


def _json_row(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not valid JSON ({error}); a JSONL file has one object per line"
        ) from None
    if not isinstance(row, dict):
        raise DataError(f'{where}: must be an object {{"image": …, "query": …, …}}')
    return row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Callable[[], dict]]]:
    # Run lengths and polygons may exceed the limit of 131,072 characters that is Python's default.
    csv.field_size_limit(2**31 - 1)
    delimiter = _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    header, end = None, 0
    while True:
        start = end + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}:{start}: not valid CSV ({error}); quote texts with {delimiter!r}, double"
                " the quotes in them"
            ) from None
        end = reader.line_num
        if header is None:
            header = [name.strip() for name in cells]
            if len(set(header)) != len(header) or not {"image", "query"} <= set(header):
                raise DataError(
                    f'{path}:{start}: the first line must name the columns, each once, "image" and'
                    f' "query" among them; it names {", ".join(header)[:80]}'
                )
        elif cells:
            yield start, partial(_csv_row, header, cells, f"{path}:{start}")


def _delimiter(text: str) -> str:
    """What separates the columns: a comma, or what Excel writes in many countries, if only with it
    the first line names the needed columns."""
    first = text.lstrip("\r\n").split("\n", 1)[0]
    for delimiter in ",;\t":
        names = {name.strip().strip('"') for name in first.split(delimiter)}
        if {"image", "query"} <= names:
            return delimiter
    return ","


def _csv_row(header: list[str], cells: list[str], where: str) -> dict:
    if len(cells) != len(header):
        raise DataError(
            f"{where}: has {len(cells)} cells, the first line has {len(header)} columns"
        )
    row: dict[str, Any] = {
        name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()
    }
    always_json = ("rle", "polygons", "targets", "is_sentence")
    for name in (*always_json, "ignore", "query"):
        cell = row.get(name, "").strip()
        if cell and (name in always_json or cell[0] in "[{"):
            try:
                row[name] = json.loads(cell.lower() if name == "is_sentence" else cell)
            except (ValueError, RecursionError) as error:
                raise DataError(f'{where}: "{name}" is not valid JSON ({error})') from None
    return row


def _query_of(row: dict, where: str) -> OwnQuery:
    image = row.get("image")
    if not isinstance(image, str) or not image.strip():
        raise DataError(
            f'{where}: "image" must be the name of an image; a row has image, query and one of'
            " mask, rle and polygons"
        )
    return OwnQuery(
        item=where,
        image=image,
        texts=wordings_of(row.get("query"), where, "query"),
        targets=_targets(row, where),
        ignore=[] if row.get("ignore") is None else _ignore(row["ignore"], where),
        answer=optional_field(row, "answer", str, where, "a text"),
        is_sentence=optional_field(row, "is_sentence", bool, where, "true or false"),
        split=optional_field(row, "split", str, where, "a text") or "train",
    )


def _targets(row: dict, where: str) -> list[list[Shape]]:
    targets = row.get("targets")
    if targets is None:
        return [_shapes_of(row, where)]
    is_list = isinstance(targets, list) and all(isinstance(target, dict) for target in targets)
    if not is_list or not targets:
        raise DataError(
            f'{where}: "targets" must be a list of objects with mask, rle or polygons (for an empty'
            " target: polygons [])"
        )
    if any(row.get(name) is not None for name in SHAPE_COLUMNS):
        raise DataError(
            f'{where}: has "targets" and a mask, rle or polygons beside them; give one of the two'
        )
    return [
        _shapes_of(target, where, f"targets[{number}] ") for number, target in enumerate(targets)
    ]


def _ignore(value: Any, where: str) -> list[Shape]:
    """The shape of the column "ignore": a PNG's name, run lengths or polygons, told apart by their
    JSON types."""
    name = "mask" if isinstance(value, str) else "rle" if isinstance(value, dict) else "polygons"
    kind, read = SHAPE_COLUMNS[name]
    return [(kind, read(value, where, "ignore"), where)]

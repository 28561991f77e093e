"""Your own data as a table: JSON Lines, a JSON list, CSV, or Parquet rows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dataset.files.errors import DataError
from dataset.files.faults import Faults
from dataset.files.text import read_text
from dataset.readers.own.arrow import PARQUET, rows
from dataset.readers.own.formats import Query, optional, png_of, polygons_of, rle_of, texts_of

SHAPE_COLUMNS = {
    "mask": ("png", png_of),
    "rle": ("rle", rle_of),
    "polygons": ("polygons", polygons_of),
}


def _shapes_of(entry: dict, where: str, prefix: str = "") -> list[tuple[str, Any]]:
    """The one of mask, rle and polygons that ``entry`` has. Raises DataError for none and for
    several."""
    given = [name for name in SHAPE_COLUMNS if entry.get(name) is not None]
    if len(given) != 1:
        found = f"{' and '.join(given)} are" if given else "none is"
        raise DataError(
            f"{where}: {prefix}needs one of mask, rle and polygons, {found} given (for an empty"
            " target: polygons [])"
        )
    kind, read = SHAPE_COLUMNS[given[0]]
    value = read(entry[given[0]], where, prefix + given[0])
    return [] if kind == "polygons" and not value else [(kind, value)]


# -------------------------------------------------------------------------------------------- table


def read_table(path: Path, faults: Faults, dataset: str) -> Iterator[Query]:
    """The rows of a JSONL or CSV file or an Arrow table (dataset/readers/own/arrow.py). CSV holds
    lists and objects as JSON in a cell; an empty cell is no value."""
    seen: dict[str, str] = {}
    for item, place, read in (
        rows(path) if path.is_dir() or path.suffix == PARQUET else _lines(path)
    ):
        if faults.skips(dataset, item):
            continue
        with faults.guard(dataset, item):
            row = read()
            query = _row(row, item)
            same = json.dumps(
                [query.image, query.texts, query.targets, query.split], sort_keys=True
            )
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
        raise DataError(
            f"{where}: not valid JSON ({error}); a JSONL file has one object per line"
        ) from None
    if not isinstance(row, dict):
        raise DataError(f'{where}: must be an object {{"image": …, "query": …, …}}')
    return row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Callable[[], dict]]]:
    # run lengths and polygons exceed the 131,072 characters of Python's default
    csv.field_size_limit(2**31 - 1)
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
                f"{path}:{start}: not valid CSV ({error}); quote texts with commas, double the"
                " quotes in them"
            ) from None
        end = reader.line_num
        if header is None:
            header = [name.strip() for name in cells]
            if len(set(header)) != len(header) or not {"image", "query"} <= set(header):
                raise DataError(
                    f'{path}:{start}: the first line must name the columns, each once, "image" and'
                    ' "query" among them'
                )
        elif cells:
            yield start, partial(_csv_row, header, cells, f"{path}:{start}")


def _csv_row(header: list[str], cells: list[str], where: str) -> dict:
    if len(cells) != len(header):
        raise DataError(
            f"{where}: has {len(cells)} cells, the first line has {len(header)} columns"
        )
    row: dict[str, Any] = {
        name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()
    }
    for name in ("rle", "polygons", "targets", "ignore", "query", "is_sentence"):
        cell = row.get(name, "").strip()
        if cell and (
            name in ("rle", "polygons", "targets") or cell[0] in "[{" or name == "is_sentence"
        ):
            try:
                row[name] = json.loads(cell.lower() if name == "is_sentence" else cell)
            except (ValueError, RecursionError) as error:
                raise DataError(f'{where}: "{name}" is not valid JSON ({error})') from None
    return row


def _row(row: dict, where: str) -> Query:
    image = row.get("image")
    if not isinstance(image, str) or not image.strip():
        raise DataError(
            f'{where}: "image" must be the name of an image; a row has image, query and one of'
            " mask, rle and polygons"
        )
    texts = texts_of(row.get("query"), where, "query")
    return Query(
        item=where,
        image=image,
        texts=texts,
        targets=_targets(row, where),
        ignore=[] if row.get("ignore") is None else _ignore(row["ignore"], where),
        answer=optional(row, "answer", str, where, "a text"),
        is_sentence=optional(row, "is_sentence", bool, where, "true or false"),
        split=optional(row, "split", str, where, "a text") or "train",
    )


def _targets(row: dict, where: str) -> list[list[tuple[str, Any]]]:
    targets = row.get("targets")
    if targets is None:
        return [_shapes_of(row, where)]
    if (
        not isinstance(targets, list)
        or not targets
        or any(not isinstance(target, dict) for target in targets)
    ):
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


def _ignore(value: Any, where: str) -> list[tuple[str, Any]]:
    """A PNG's name, run lengths or polygons: what they are is seen from them."""
    name = "mask" if isinstance(value, str) else "rle" if isinstance(value, dict) else "polygons"
    kind, read = SHAPE_COLUMNS[name]
    return [(kind, read(value, where, "ignore"))]

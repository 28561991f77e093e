"""Tables of Hugging Face datasets as a user's own data: what ``save_to_disk`` wrote, and Parquet
files.

::

    own/<name>/                            a Dataset's save_to_disk (state.json, *.arrow), or a DatasetDict's (dataset_dict.json)
    own/<name>/<split>/                    a Dataset's save_to_disk
    own/<name>/<split>.parquet             Parquet, also in pieces: <split>-00000-of-00002.parquet, <split>-00001-of-00002.parquet

pyarrow alone reads them: local files only, mapped into memory and never held in it. Parquet is
compressed, so it is unpacked once into the cache (dataset/files/store.py) and mapped from there.

A row is named as in ``dataset[12]``: "own/signs/train:row 12",
"own/signs/train-00001-of-00002.parquet:row 12" (of this file).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path, PureWindowsPath
from typing import Any

from dataset.files.errors import DataError, MissingDataError
from dataset.files.paths import resolve_inside
from dataset.files.store import StoreWriter, open_store
from dataset.files.text import read_json

COLUMNS = (
    "image",
    "query",
    "mask",
    "rle",
    "polygons",
    "targets",
    "ignore",
    "answer",
    "is_sentence",
    "split",
)
PARQUET = ".parquet"
PYARROW = "pyarrow==26.0.1"
UNPACKED = "table.arrow"
ROWS_AT_ONCE = 64  # of Parquet while it is unpacked: photos are large
_PIECE = re.compile(r"(.+)-\d{5}-of-(\d{5})\.parquet")
_CELL = re.compile(r"(.+):row (\d+)/(\w+)(?:\[(\d+)\])?/[^/]+")


# ------------------------------------------------------------------------------------ finding files


def is_saved(folder: Path) -> bool:
    """Whether a Dataset was saved to ``folder``."""
    return (folder / "state.json").is_file()


def saved_sources(folder: Path) -> dict[str, Path]:
    """split -> folder of each Dataset in a saved DatasetDict; "" -> a saved Dataset; {}: neither.
    Raises DataError."""
    if is_saved(folder):
        return {"": folder}
    listing = folder / "dataset_dict.json"
    if not listing.is_file():
        return {}
    splits = (content if isinstance(content := read_json(listing), dict) else {}).get("splits")
    if (
        not isinstance(splits, list)
        or not splits
        or any(not isinstance(split, str) for split in splits)
    ):
        raise DataError(f'{listing}: must name the "splits" that DatasetDict.save_to_disk wrote')
    return {split: resolve_inside(folder, split) for split in splits}


def stem_of(source: Path) -> str:
    """The split that a file or folder is called after: "train" for train-00000-of-00002.parquet."""
    piece = _PIECE.fullmatch(source.name)
    return piece[1] if piece else source.stem


def first_pieces(folder: Path, stem: str) -> list[Path]:
    """The first file of the Parquet ``stem`` in pieces, whether or not it is there; several for
    pieces of several divisions."""
    pieces = [
        found
        for path in folder.iterdir()
        if (found := _PIECE.fullmatch(path.name)) and found[1] == stem
    ]
    return sorted({folder / f"{stem}-00000-of-{piece[2]}{PARQUET}" for piece in pieces})


def _tables(source: Path) -> list[Path]:
    """``source``, or all pieces if it is the first one of several. Raises MissingDataError."""
    piece = _PIECE.fullmatch(source.name)
    count = int(piece[2]) if piece else 1
    paths = (
        [source.with_name(f"{piece[1]}-{n:05d}-of-{piece[2]}{PARQUET}") for n in range(count)]
        if piece
        else [source]
    )
    for path in paths:
        if not path.exists():
            raise MissingDataError(
                f"{path}: is not there; all {count} pieces of {stem_of(source)}{PARQUET} are needed"
            )
    return [resolve_inside(path.parent, path.name) for path in paths]


# -------------------------------------------------------------------------------------------- cells


class Cell(str):
    """A picture inside a table: "…/train.parquet:row 3/image/cat.jpg", with the name that it had as
    a file, for whoever reads it.

    It is read like a file (``read_image``); records and messages hold this text as they hold a
    file's name.
    """

    def open(self, mode: str = "rb") -> io.BytesIO:
        """The bytes of the picture's file. Raises DataError where the table is gone or another
        one."""
        table, row, column, target = _CELL.fullmatch(self).groups()
        try:
            value = _open_table(Path(table))[column][int(row)].as_py()
            value = value if target is None else value[int(target)]["mask"]
            return io.BytesIO(value["bytes"] if isinstance(value, dict) else value)
        except (IndexError, KeyError, TypeError):
            raise DataError(
                f"{table}: is not the table it was when its rows were read; start again"
            ) from None


def picture(name: str) -> Path | Cell:
    """What ``name``, in a record, stands for."""
    return Cell(name) if _CELL.fullmatch(name) and not Path(name).exists() else Path(name)


# --------------------------------------------------------------------------------------------- rows


def rows(source: Path) -> Iterator[tuple[str, str, Callable[[], dict]]]:
    """(item, words for the place, function that gives the row as JSONL would have it) for every
    row.

    Pictures with the same bytes are the same Cell, that of the first: they are one image with
    several queries. Raises DataError.
    """
    seen: dict[bytes, Cell] = {}
    for path in _tables(source):
        table = _open_table(path)
        for needed in ("image", "query"):
            if needed not in table.column_names:
                raise DataError(
                    f'{path}: has no column "{needed}"; a row has image, query and one of mask, rle'
                    " and polygons"
                )
        table = table.select([name for name in COLUMNS if name in table.column_names])
        for number in range(len(table)):
            item = f"{path}:row {number}"
            # not in the function: a row that a skip list leaves out must not rename the picture of
            # others
            row = _with_cells(table.slice(number, 1).to_pylist()[0], item, seen)
            yield item, f"row {number} of {path.name}", partial(dict, row)


def _with_cells(row: dict, item: str, seen: dict[bytes, Cell]) -> dict:
    for column in ("image", "mask", "ignore"):
        row[column] = _named(row.get(column), f"{item}/{column}", seen)
    if isinstance(row.get("targets"), list):
        for number, target in enumerate(row["targets"]):
            if isinstance(target, dict):
                target["mask"] = _named(target.get("mask"), f"{item}/targets[{number}]", seen)
                target["rle"] = _given(target.get("rle"))
    row["rle"] = _given(row.get("rle"))
    return row


def _given(value: Any) -> Any:
    """Arrow may hold a missing object as one whose fields are all missing."""
    return (
        None
        if isinstance(value, dict) and all(field is None for field in value.values())
        else value
    )


def _named(value: Any, place: str, seen: dict[bytes, Cell]) -> Any:
    """A Cell for an embedded picture (bytes, or datasets' Image: {"bytes", "path"}), a name for its
    path alone, else ``value``."""
    value = _given(value)
    embedded = value if isinstance(value, dict) else {"bytes": value}
    raw, path = embedded.get("bytes"), embedded.get("path")
    if isinstance(raw, bytes):
        name = " ".join(PureWindowsPath(path).name.split()) if isinstance(path, str) else ""
        cell = Cell(f"{place}/{name or place.rsplit(':', 1)[1].split('/')[0]}")
        return seen.setdefault(hashlib.blake2b(raw, digest_size=16).digest(), cell)
    return path if isinstance(path, str) and raw is None else value


# ------------------------------------------------------------------------------------------- tables


def _open_table(path: Path) -> Any:
    """A pyarrow.Table of mapped files, the same until they are written anew. Raises DataError."""
    marker = path / "state.json" if path.is_dir() else path
    try:
        return _mapped(path, marker.stat().st_mtime_ns)
    except FileNotFoundError as error:
        raise (
            error if isinstance(error, DataError) else MissingDataError(f"{marker}: does not exist")
        ) from None


@lru_cache(maxsize=32)
def _mapped(path: Path, _: int) -> Any:
    pyarrow = _pyarrow(path)
    files = (
        _saved_files(path)
        if path.is_dir()
        else [open_store(path, "parquet-1", _unpack).folder / UNPACKED]
    )
    try:
        tables = [
            pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all() for file in files
        ]
        table = pyarrow.concat_tables(tables)
        table.validate(full=True)  # offsets that point elsewhere would be followed
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    return table


def _saved_files(folder: Path) -> list[Path]:
    """The files that state.json names. Others, which ``datasets`` caches there, do not count."""
    state = read_json(folder / "state.json")
    entries = state.get("_data_files") if isinstance(state, dict) else None
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or ()]
    if not names or any(not isinstance(name, str) for name in names):
        raise DataError(
            f'{folder}/state.json: must name the "_data_files" that Dataset.save_to_disk wrote'
        )
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder}: its rows are a selection saved by an old version; call flatten_indices()"
            " and save it again"
        )
    return [resolve_inside(folder, name) for name in names]


def _unpack(source: Path, store: StoreWriter) -> None:
    """Writes the known columns of a Parquet file as an Arrow stream."""
    pyarrow = _pyarrow(source)
    with pyarrow.OSFile(str(store.folder / UNPACKED), "wb") as sink:
        try:
            with pyarrow.parquet.ParquetFile(source, memory_map=True) as parquet:
                schema = parquet.schema_arrow
                schema = pyarrow.schema([field for field in schema if field.name in COLUMNS])
                with pyarrow.ipc.new_stream(sink, schema) as stream:
                    for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=schema.names):
                        stream.write_batch(batch)
        except (pyarrow.ArrowException, OSError) as error:
            if getattr(error, "errno", None):
                raise  # a full disk
            raise _unreadable(source, error) from None
    store.finish(UNPACKED, verify=False)  # too large to be read whole by every process


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"{path}: not a readable table ({reason}); write it again with save_to_disk or to_parquet"
    )


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path}: is read with pyarrow, which is not installed: pip install {PYARROW}"
        ) from None
    return pyarrow

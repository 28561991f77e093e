"""Tables of Hugging Face datasets as a user's own data: what ``save_to_disk`` wrote, and Parquet
files.

::

    own/<name>/                  a Dataset's save_to_disk (state.json, *.arrow), or a DatasetDict's
                                 (dataset_dict.json)
    own/<name>/<split>/          a Dataset's save_to_disk
    own/<name>/<split>.parquet   Parquet, also in pieces: <split>-00000-of-00002.parquet,
                                 <split>-00001-of-00002.parquet

They are read with pyarrow alone. Local files are mapped into memory and never held in it. Parquet
is compressed, so it is unpacked once into the cache (dataset/files/store.py) and mapped from there;
its checksum is compared at every start, when every row is read anyway. A few bytes of Parquet can
unpack to any number, so one that grows more than photos and texts do is refused.

A row is named as in ``dataset[12]``: "own/signs/train:row 12",
"own/signs/train-00001-of-00002.parquet:row 12" (of this file).
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path, PureWindowsPath
from typing import Any

from cores.dataset.files.errors import DataError, MissingDataError, reason_of
from cores.dataset.files.paths import resolve_inside
from cores.dataset.files.store import StoreWriter, open_store
from cores.dataset.files.text import read_json

SHAPE_COLUMNS = ("mask", "rle", "polygons", "targets", "ignore")
COLUMNS = ("image", "query", *SHAPE_COLUMNS, "answer", "is_sentence", "split")
PARQUET = ".parquet"
PYARROW = "pyarrow==26.0.1"
UNPACKED = "table.arrow"
UNPACKED_LIMIT = "CORES_UNPACKED_GB"  # the variable with the most that a Parquet may unpack to
GIGABYTE = 10**9
GROWTH = 50  # Photos do not grow, texts a few times, masks of zeros and ones some ten times.
ROWS_AT_ONCE = 64  # Few rows of Parquet are unpacked at a time, because photos are large.
_PIECE = re.compile(r"(.+)-\d{5}-of-(\d{5})\.parquet")
_PLACE = re.compile(r"(.+):row (\d+)/(\w+)(?:\[(\d+)\])?/[^/]+")


def is_saved(folder: Path) -> bool:
    """Whether a Dataset was saved to ``folder``."""
    return (folder / "state.json").is_file()


def saved_sources(folder: Path, follow_links: bool = False) -> dict[str, Path]:
    """split -> folder of each Dataset in a saved DatasetDict; "" -> a saved Dataset; {}: neither.
    Raises DataError."""
    if is_saved(folder):
        return {"": folder}
    listing = folder / "dataset_dict.json"
    if not listing.is_file():
        return {}
    content = read_json(listing)
    splits = content.get("splits") if isinstance(content, dict) else None
    is_list = isinstance(splits, list) and all(isinstance(split, str) for split in splits)
    if not is_list or not splits:
        raise DataError(f'{listing}: must name the "splits" that DatasetDict.save_to_disk wrote')
    return {split: resolve_inside(folder, split, follow_links) for split in splits}


def stem_of(source: Path) -> str:
    """The split in the name of a file or folder: "train" for train-00000-of-00002.parquet."""
    piece = _PIECE.fullmatch(source.name)
    return piece[1] if piece else source.stem


def first_pieces(folder: Path, stem: str) -> list[Path]:
    """The first file of the Parquet ``stem`` in pieces, whether or not it is there; several files
    if there are pieces of several divisions."""
    pieces = (_PIECE.fullmatch(path.name) for path in folder.iterdir())
    counts = {piece[2] for piece in pieces if piece and piece[1] == stem}
    return sorted(folder / f"{stem}-00000-of-{count}{PARQUET}" for count in counts)


def _tables(source: Path) -> list[Path]:
    """``source``, or all pieces if it is the first one of several. Raises MissingDataError."""
    paths = [source]
    if piece := _PIECE.fullmatch(source.name):
        stem, count = piece.groups()
        paths = [source.with_name(f"{stem}-{n:05d}-of-{count}{PARQUET}") for n in range(int(count))]
    for path in paths:
        if not path.exists():
            raise MissingDataError(
                f"{path}: is not there; all {len(paths)} pieces of {stem_of(source)}{PARQUET} are"
                " needed"
            )
    return [resolve_inside(path.parent, path.name) for path in paths]


class TableImage(str):
    """An image inside a table: "…/train.parquet:row 3/image/cat.jpg", ending with the name that it
    had as a file.

    ``read_image`` reads it like a file, and records and messages hold this text like a file's name.
    """

    def open(self, mode: str = "rb") -> io.BytesIO:
        """The bytes of the image's file. Raises DataError if the table is gone or was replaced."""
        place = _PLACE.fullmatch(self)
        assert place is not None, self  # arrow_rows and image_named give no other text.
        table, row, column, target = place.groups()
        try:
            value = _open_table(Path(table))[column][int(row)].as_py()
            value = value if target is None else value[int(target)]["mask"]
            return io.BytesIO(value["bytes"] if isinstance(value, dict) else value)
        except (IndexError, KeyError, TypeError):
            raise DataError(
                f"{table}: is not the table it was when its rows were read; start again"
            ) from None


def image_named(name: str) -> Path | TableImage:
    """The image or mask that a record names: a file, or an image inside a table."""
    is_place = _PLACE.fullmatch(name) and not Path(name).exists()
    return TableImage(name) if is_place else Path(name)


def arrow_rows(source: Path) -> Iterator[tuple[str, str, Callable[[], dict]]]:
    """(item, words for the place, function that returns the row as JSONL would have it) for every
    row.

    Images with the same bytes are the same TableImage, that of the first row that has them, so that
    they become one image with several queries. Raises DataError.
    """
    seen: dict[bytes, TableImage] = {}
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
            # Outside of the returned function, which is not called for a row on a skip list: an
            # image must keep its name, whether or not another row with it is skipped.
            row = _with_images(table.slice(number, 1).to_pylist()[0], item, seen)
            yield item, f"row {number} of {path.name}", partial(dict, row)


def _with_images(row: dict, item: str, seen: dict[bytes, TableImage]) -> dict:
    """The row with a TableImage or a file name for each of its images and masks."""
    for column in ("image", "mask", "ignore"):
        row[column] = _image_or_name(row.get(column), f"{item}/{column}", seen)
    if isinstance(row.get("targets"), list):
        for number, target in enumerate(row["targets"]):
            if isinstance(target, dict):
                mask = target.get("mask")
                target["mask"] = _image_or_name(mask, f"{item}/targets[{number}]", seen)
                target["rle"] = _none_if_empty(target.get("rle"))
    row["rle"] = _none_if_empty(row.get("rle"))
    return row


def _none_if_empty(value: Any) -> Any:
    """None for an object without any value, which is how Arrow may hold a missing object."""
    is_empty = isinstance(value, dict) and all(field is None for field in value.values())
    return None if is_empty else value


def _image_or_name(value: Any, place: str, seen: dict[bytes, TableImage]) -> Any:
    """A TableImage for embedded bytes (alone, or in a {"bytes", "path"} as datasets' Image has
    them), a file name for a path alone, and any other ``value`` as it is."""
    value = _none_if_empty(value)
    embedded = value if isinstance(value, dict) else {"bytes": value}
    raw, path = embedded.get("bytes"), embedded.get("path")
    if isinstance(raw, bytes):
        name = " ".join(PureWindowsPath(path).name.split()) if isinstance(path, str) else ""
        image = TableImage(f"{place}/{name or place.rsplit(':', 1)[1].split('/')[0]}")
        return seen.setdefault(hashlib.blake2b(raw, digest_size=16).digest(), image)
    return path if isinstance(path, str) and raw is None else value


def _open_table(path: Path) -> Any:
    """A pyarrow.Table of mapped files, which stays open until they are written anew. Raises
    DataError."""
    marker = path / "state.json" if path.is_dir() else path
    try:
        return _mapped(path, marker.stat().st_mtime_ns)
    except DataError:
        raise
    except FileNotFoundError:
        raise MissingDataError(f"{marker}: does not exist") from None


@lru_cache(maxsize=32)
def _mapped(path: Path, _written: int) -> Any:
    """``_written``, the time of the last change, makes a changed table a new one for the cache."""
    pyarrow = _pyarrow(path)
    if path.is_dir():
        files = _saved_files(path)
    else:
        files = [open_store(path, "parquet-2", _unpack).folder / UNPACKED]
    try:
        streams = [pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))) for file in files]
        table = pyarrow.concat_tables([stream.read_all() for stream in streams])
        table.validate(full=True)  # pyarrow would follow offsets that point out of the file.
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    return table


def _saved_files(folder: Path) -> list[Path]:
    """The files that state.json names. Other files in the folder are caches of ``datasets``."""
    state = read_json(folder / "state.json")
    entries = state.get("_data_files") if isinstance(state, dict) else None
    files = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or ()]
    names = [name for name in files if isinstance(name, str)]
    if not names or len(names) < len(files):
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
                limit = _unpacked_limit(source)
                _refuse_growth(source, _claimed_bytes(parquet.metadata), limit)
                with pyarrow.ipc.new_stream(sink, schema) as stream:
                    for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=schema.names):
                        _refuse_growth(source, sink.tell() + batch.nbytes, limit)
                        stream.write_batch(batch)
        except (pyarrow.ArrowException, OSError) as error:
            if getattr(error, "errno", None):
                raise  # An error of the system, such as a full disk, says nothing about the file.
            raise _unreadable(source, error) from None
    store.finish(UNPACKED)


def _unpacked_limit(source: Path) -> float:
    """The most bytes that a Parquet may unpack to: what the environment says, or a multiple of its
    size, but a gigabyte in any case. Raises DataError."""
    stated = os.environ.get(UNPACKED_LIMIT)
    if stated is None:
        return max(GIGABYTE, GROWTH * source.stat().st_size)
    try:
        return float(stated) * GIGABYTE
    except ValueError:
        raise DataError(f"{UNPACKED_LIMIT} is {stated!r}; give a number of gigabytes") from None


def _claimed_bytes(metadata: Any) -> int:
    """What a Parquet says its pages unpack to. Values that repeat may take more than that."""
    return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))


def _refuse_growth(source: Path, size: int, limit: float) -> None:
    if size > limit:
        raise DataError(
            f"{source}: unpacks to more than {limit / GIGABYTE:.1f} GB, from"
            f" {source.stat().st_size / GIGABYTE:.6f} GB; if that is right, set {UNPACKED_LIMIT} to"
            " the gigabytes that it may take"
        )


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: not a readable table ({reason_of(error)}); write it again with save_to_disk or"
        " to_parquet"
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

"""Indexes of large annotation files: built once, mapped into memory, shared by all workers and
ranks (dataset/files/store.py).

``CocoIndex`` for COCO's format, ``RecordIndex`` for a JSON that is one long list. Both can be given
to DataLoader workers however these are started: what is pickled is the name of the file.

I is the number of images, A the number of annotations of a file.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset.files.errors import DamagedRecords, DataError
from dataset.files.json_stream import JsonReader, parse_stream
from dataset.files.store import Build, Store, StoreWriter, open_store


class BadEntry(NamedTuple):
    """What is wrong with one entry of a list, found when the index was built."""

    place: str
    """Which one it is, "annotation at position 7"."""
    reason: str
    """In full, but for the name of the file."""
    image: str | None = None
    """The image that goes with it, where it is known: what is asked about this one would not be
    true without the entry."""


class _Index:
    """What both have in common: opening, repair and pickling. Subclasses say in ``_load`` what they
    take from the store."""

    bad: list[BadEntry]
    """Entries that cannot be used, in the order of the file. Only a tolerant index has some."""

    def __init__(
        self,
        source: str | Path,
        cache_dir: str | Path | None,
        kind: str,
        build: Build,
        tolerant: bool,
    ):
        self.source, self.cache_dir = Path(source), None if cache_dir is None else Path(cache_dir)
        self._kind, self._build = kind, build
        self._open(None)
        # another process has built it for a loader that leaves them out
        if self.bad and not tolerant:
            raise DataError(f"{self.source}: {self.bad[0].reason}")

    def _open(self, damaged: Store | None) -> None:
        self._store = open_store(self.source, self._kind, self._build, self.cache_dir, damaged)
        self.bad = [BadEntry(*entry) for entry in self._store.json("bad")]
        self._load(self._store)

    def _load(self, store: Store) -> None:
        raise NotImplementedError

    def _record(self, table: str, row: int) -> Any:
        try:
            return getattr(self, table)[row]
        except DamagedRecords:
            self._open(damaged=self._store)
        return getattr(self, table)[row]

    def __getstate__(self) -> dict:
        names = ("source", "cache_dir", "_kind", "_build")
        return {name: getattr(self, name) for name in names} | {"digest": self._store.digest}

    def __setstate__(self, state: dict) -> None:
        digest = state.pop("digest")
        self.__dict__.update(state)
        self._open(None)
        if self._store.digest != digest:
            raise DataError(
                f"{self.source}: is not the file it was when this process was started; start again"
            )


# ------------------------------------------------------------------------------------ COCO's format


class CocoIndex(_Index):
    """Images, sorted by file name, with their annotations in the order of the file; entries keep
    all their fields.

    ``categories``: category id -> entry. ``file_names``: of each image, as a read-only sequence. By
    row, where the annotations of an image are consecutive rows (``rows``): ``annotation_ids`` int64
    (A,), ``category_ids`` int64 (A,), ``is_crowd`` bool (A,).
    """

    @classmethod
    def open(
        cls,
        annotation_file: str | Path,
        cache_dir: str | Path | None = None,
        tolerant: bool = False,
    ) -> CocoIndex:
        """Builds the index if it is not yet in ``cache_dir`` (default: see dataset/files/store.py).

        ``tolerant``: images and annotations that cannot be used are left out and in ``bad``. Raises
        MissingDataError, or DataError naming the file and the entry: ids that occur twice, broken
        JSON, and, unless ``tolerant``, an annotation of an unknown image or category and a missing
        or wrong field.
        """
        return cls(
            annotation_file, cache_dir, "coco-2", partial(build_coco, tolerant=tolerant), tolerant
        )

    def _load(self, store: Store) -> None:
        self.categories: dict[int, dict] = {
            entry["id"]: entry for entry in store.json("categories")
        }
        self.file_names = store.records("file_names")
        self._images, self._annotations = store.records("images"), store.records("annotations")
        self._first = store.array("first")
        self.annotation_ids, self.category_ids = (
            store.array("annotation_ids"),
            store.array("category_ids"),
        )
        self.is_crowd = store.array("is_crowd")
        self._image_lookup, self._annotation_lookup = (
            store.array("image_lookup"),
            store.array("annotation_lookup"),
        )

    def __len__(self) -> int:
        return len(self._images)

    def image(self, position: int) -> dict:
        """The entry of an image: id, file_name, height, width and whatever else the file says.
        Raises IndexError."""
        return self._record("_images", position)

    def rows(self, position: int) -> slice:
        """The rows of an image's annotations. Raises IndexError."""
        if not 0 <= position < len(self):
            raise IndexError(position)
        return slice(int(self._first[position]), int(self._first[position + 1]))

    def annotations(self, position: int) -> list[dict]:
        """The entries of an image's annotations: id, image_id, category_id, segmentation, … Raises
        IndexError."""
        rows = self.rows(position)
        return [self._record("_annotations", row) for row in range(rows.start, rows.stop)]

    def image_position(self, image_id: int) -> int:
        """Where the image with this id is. Raises KeyError."""
        return _look_up(self._image_lookup, image_id)

    def annotation(self, annotation_id: int) -> dict:
        """The annotation with this id. Raises KeyError."""
        return self._record("_annotations", _look_up(self._annotation_lookup, annotation_id))

    def with_instances(self) -> np.ndarray:
        """Positions of the images with at least one annotation that is not a crowd region, int64,
        ascending."""
        counts = np.concatenate([[0], np.cumsum(~self.is_crowd)])[self._first]
        return np.flatnonzero(np.diff(counts))


def _look_up(table: np.ndarray, wanted: int) -> int:
    """``table``: int64 (2, n), ids in ascending order and the row of each."""
    ids, rows = table
    at = int(np.searchsorted(ids, wanted))
    if at == len(ids) or ids[at] != wanted:
        raise KeyError(wanted)
    return int(rows[at])


class _Spool:
    """Texts in a temporary file, to be read again in another order."""

    def __init__(self, folder: Path):
        self._stream = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by copy)
        self._ends = array("q", [0])

    def add(self, value: Any, text: str) -> None:
        # indented files are mostly space
        blob = (json.dumps(value, separators=(",", ":")) if "\n" in text else text).encode()
        self._stream.write(blob)
        self._ends.append(self._ends[-1] + len(blob))

    def copy(self, store: StoreWriter, name: str, order: np.ndarray) -> None:
        with store.records(name) as records, self._stream:
            self._stream.flush()
            for row in order.tolist():
                start, end = self._ends[row], self._ends[row + 1]
                records.add(os.pread(self._stream.fileno(), end - start, start))


class _CocoParser:
    """Takes a COCO file apart: entries go to spools, what they are sorted and looked up by to
    columns."""

    def __init__(self, source: Path, folder: Path, tolerant: bool):
        self.source, self.tolerant = source, tolerant
        self.bad: list[tuple[BadEntry, Any]] = []
        """With the id of the image."""
        self.bad_images: set[int] = set()
        self.images, self.annotations = _Spool(folder), _Spool(folder)
        self.file_names: list[str] = []
        self.image_ids, self.annotation_ids = array("q"), array("q")
        self.image_of, self.category_of, self.crowd = array("q"), array("q"), array("b")
        self.categories: list[dict] = []

    def parse(self, reader: JsonReader) -> None:
        take = {
            "images": self._image,
            "annotations": self._annotation,
            "categories": self._category,
        }
        missing = set(take)
        for key in reader.members() if reader.peek() == "{" else _other(reader):
            if key in missing and reader.peek() == "[":
                missing.remove(key)
                for number, (entry, text) in enumerate(reader.items()):
                    try:
                        if not isinstance(entry, dict):
                            raise DataError(f'"{key}" entry {number} is not an object')
                        take[key](entry, text, f'"{key}" entry {number}')
                    except DataError as error:
                        self._refuse(key, number, entry, str(error))
            else:
                reader.value()
        if missing:
            first = next(key for key in take if key in missing)
            raise DataError(
                f'{self.source}: has no list "{first}"; a COCO instances file is expected'
            )
        reader.end()

    def _refuse(self, key: str, number: int, entry: Any, reason: str) -> None:
        """Writes a bad entry down. Raises DataError where this is not wanted, and for a category,
        without which many are bad."""
        if not self.tolerant or key == "categories":
            raise DataError(f"{self.source}: {reason}")
        entry = entry if isinstance(entry, dict) else {}
        bad = BadEntry(f"{key.removesuffix('s')} at position {number}", reason)
        if key == "annotations":
            self.bad.append((bad, entry.get("image_id")))
            return
        name = entry.get("file_name")
        self.bad.append((bad._replace(image=name if isinstance(name, str) else None), None))
        if type(entry.get("id")) is int:
            self.bad_images.add(entry["id"])

    def _image(self, entry: dict, text: str, where: str) -> None:
        number = _whole(entry, "id", where)
        name = _field(entry, "file_name", where)
        if not isinstance(name, str):
            raise DataError(f'{where}: "file_name" must be a text')
        for field in ("height", "width"):
            value = _field(entry, field, where)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise DataError(f'{where}: "{field}" must be a positive number of pixels')
        self.image_ids.append(number)
        self.file_names.append(name)
        self.images.add(entry, text)

    def _annotation(self, entry: dict, text: str, where: str) -> None:
        number, image, category = (
            _whole(entry, name, where) for name in ("id", "image_id", "category_id")
        )
        _field(entry, "segmentation", where)
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise DataError(f'{where}: "iscrowd" must be 0 or 1')
        self.annotation_ids.append(number)
        self.image_of.append(image)
        self.category_of.append(category)
        self.crowd.append(int(crowd))
        self.annotations.add(entry, text)

    def refuse_unknown(self, row: int) -> None:
        """The annotation of a row whose image or category is not there; of an image that is bad
        itself, nothing need be said."""
        number, image = self.annotation_ids[row], self.image_of[row]
        reason = f"annotation {number} names an unknown image or category"
        if not self.tolerant:
            raise DataError(f"{self.source}: {reason}")
        if image not in self.bad_images:
            self.bad.append((BadEntry(f"annotation {number}", reason), image))

    def named_bad(self) -> list[BadEntry]:
        """The bad entries with the names of the images that go with them."""
        names = dict(zip(self.image_ids, self.file_names, strict=True)) if self.bad else {}
        return [
            bad._replace(image=names[i]) if type(i) is int and i in names else bad
            for bad, i in self.bad
        ]

    def _category(self, entry: dict, _: str, where: str) -> None:
        _whole(entry, "id", where)
        if not isinstance(_field(entry, "name", where), str):
            raise DataError(f'{where}: "name" must be a text')
        self.categories.append(entry)


def _other(reader: JsonReader) -> tuple:
    """Steps over a value of another kind than expected, as nothing. Raises ValueError if it is no
    JSON either."""
    reader.value()
    return ()


def _field(entry: dict, name: str, where: str) -> Any:
    if name not in entry:
        raise DataError(f'{where} lacks the field "{name}"')
    return entry[name]


def _whole(entry: dict, name: str, where: str) -> int:
    value = _field(entry, name, where)
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise DataError(f'{where}: "{name}" must be a whole number')
    return value


def build_coco(source: Path, store: StoreWriter, tolerant: bool) -> None:
    """Fills ``store`` with what CocoIndex reads. Raises DataError."""
    parsers = []

    def parse(reader: JsonReader) -> None:
        # anew for every guess of the encoding
        parsers[:] = [_CocoParser(source, store.folder, tolerant)]
        parsers[0].parse(reader)

    parse_stream(source, parse)
    (parser,) = parsers
    category_ids, image_ids = (
        _unique([c["id"] for c in parser.categories], source, "categories"),
        np.array(parser.image_ids),
    )
    _unique(image_ids, source, "images")
    _unique(parser.annotation_ids, source, "annotations")
    image_of, category_of = np.array(parser.image_of), np.array(parser.category_of)
    known = np.isin(image_of, image_ids) & np.isin(category_of, category_ids)
    for row in np.flatnonzero(~known):
        parser.refuse_unknown(int(row))

    image_order = np.array(
        sorted(range(len(image_ids)), key=parser.file_names.__getitem__), dtype=np.int64
    )
    image_lookup = _lookup(image_ids[image_order])
    rows = np.flatnonzero(known)
    position_of = image_lookup[1][np.searchsorted(image_lookup[0], image_of[rows])]
    by_position = np.argsort(position_of, kind="stable")
    order = rows[by_position]
    annotation_ids = np.array(parser.annotation_ids)[order]

    store.json("bad", parser.named_bad())
    store.json("categories", parser.categories)
    with store.records("file_names", small=True) as names:
        for row in image_order:
            names.add(json.dumps(parser.file_names[row]).encode())
    parser.images.copy(store, "images", image_order)
    parser.annotations.copy(store, "annotations", order)
    store.array("first", np.searchsorted(position_of[by_position], np.arange(len(image_ids) + 1)))
    store.array("annotation_ids", annotation_ids)
    store.array("category_ids", category_of[order])
    store.array("is_crowd", np.array(parser.crowd).astype(bool)[order])
    store.array("image_lookup", image_lookup)
    store.array("annotation_lookup", _lookup(annotation_ids))


def _unique(ids: Any, source: Path, key: str) -> np.ndarray:
    ids = np.sort(np.array(ids, dtype=np.int64))
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise DataError(f'{source}: "{key}" holds the id {twice[0]} twice')
    return ids


def _lookup(ids: np.ndarray) -> np.ndarray:
    order = np.argsort(ids)
    return np.stack([ids[order], order])


# --------------------------------------------------------------------------------- lists of records

Prepare = Callable[[Path, Any, int], tuple[str, Any]]


class RecordIndex(_Index):
    """The entries of a JSON list after they were checked and reduced to what is needed; ``names``
    has one text of each."""

    @classmethod
    def open(
        cls,
        source: str | Path,
        kind: str,
        prepare: Prepare,
        cache_dir: str | Path | None = None,
        tolerant: bool = False,
    ) -> RecordIndex:
        """``prepare(source, entry, number) -> (name, record)``: a function of a module, as workers
        get it by name; it raises DataError, which begins with ``source``, for an entry that cannot
        be used. ``kind`` is its name and version, such as "vqa-2": a new version is a new index.
        ``tolerant``: these entries are left out and in ``bad``. Raises DataError, also for a list
        that is empty or none.
        """
        return cls(source, cache_dir, kind, _RecordBuilder(prepare, tolerant), tolerant)

    def _load(self, store: Store) -> None:
        self.names, self._records = store.records("names"), store.records("records")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> Any:
        """Raises IndexError."""
        return self._record("_records", number)


class _RecordBuilder:
    """The build of a RecordIndex; unlike a function inside a function it can be pickled."""

    def __init__(self, prepare: Prepare, tolerant: bool):
        self.prepare, self.tolerant = prepare, tolerant

    def __call__(self, source: Path, store: StoreWriter) -> None:
        bad: list[BadEntry] = []

        def parse(reader: JsonReader) -> int:
            count = 0
            bad.clear()  # of another guess of the encoding
            with store.records("names", small=True) as names, store.records("records") as records:
                for count, (entry, _) in enumerate(
                    reader.items() if reader.peek() == "[" else _other(reader), start=1
                ):
                    try:
                        name, record = self.prepare(source, entry, count - 1)
                    except DataError as error:
                        if not self.tolerant:
                            raise
                        bad.append(
                            BadEntry(f"record {count - 1}", str(error).removeprefix(f"{source}: "))
                        )
                        continue
                    names.add(json.dumps(name).encode())
                    records.add(json.dumps(record, separators=(",", ":")).encode())
            reader.end()
            return count

        if not parse_stream(source, parse):
            raise DataError(f"{source}: must be a non-empty list of records")
        store.json("bad", bad)

"""Indexes of large annotation files: built once, mapped into memory, shared by all workers and
ranks (dataset/files/store.py).

``CocoIndex`` serves COCO's format, ``RecordIndex`` a JSON that is one long list. Both can be given
to DataLoader workers however these are started, because only the name of the file is pickled.

I is the number of images, A the number of annotations of a file.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cores.dataset.files.errors import BOXES_ONLY, DamagedRecords, DataError
from cores.dataset.files.images import claimed_size
from cores.dataset.files.json_stream import JsonReader, parse_stream
from cores.dataset.files.lookup import photo_name
from cores.dataset.files.store import Build, IndexStore, StoreWriter, open_store


class BadEntry(NamedTuple):
    """An entry of a list that cannot be used, found when the index was built."""

    place: str
    """Which entry it is: "annotation at position 7"."""
    reason: str
    """What is wrong with it, without the name of the file."""
    image: str | None = None
    """The name of its image, where it is known. The image must be left out, too: without the entry,
    the masks for questions about it may lack an object."""


class _Index:
    """What both indexes have in common: opening, repair and pickling. ``_load`` of a subclass takes
    its tables from the store."""

    bad: list[BadEntry]
    """Entries that cannot be used, in the order of the file; always empty unless tolerant."""

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
        # A store with bad entries may be that of another process, which tolerates them.
        if self.bad and not tolerant:
            raise DataError(f"{self.source}: {self.bad[0].reason}")

    def _open(self, damaged: IndexStore | None) -> None:
        self._store = open_store(self.source, self._kind, self._build, self.cache_dir, damaged)
        self.bad = [BadEntry(*entry) for entry in self._store.json("bad")]
        self._load(self._store)

    def _load(self, store: IndexStore) -> None:
        raise NotImplementedError

    def example(self) -> str:
        """What to add to a message that nothing can be used: why the first bad entry cannot."""
        return f"; for example: {self.bad[0].reason}" if self.bad else ""

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


class CocoIndex(_Index):
    """Images, sorted by file name, with their annotations in the order of the file; entries keep
    all their fields.

    ``categories``: category id -> entry. ``file_names``: the name of each image (I,). Annotations
    have rows, and those of an image are consecutive (see ``rows``). By row: ``annotation_ids``
    int64 (A,), ``category_ids`` int64 (A,), ``is_crowd`` bool (A,).
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
            annotation_file, cache_dir, "coco-3", partial(build_coco, tolerant=tolerant), tolerant
        )

    def _load(self, store: IndexStore) -> None:
        self.categories: dict[int, dict] = {c["id"]: c for c in store.json("categories")}
        self.file_names = store.records("file_names")
        self._images, self._annotations = store.records("images"), store.records("annotations")
        self._first, self.is_crowd = store.array("first"), store.array("is_crowd")
        self.annotation_ids = store.array("annotation_ids")
        self.category_ids = store.array("category_ids")
        self._image_lookup = store.array("image_lookup")
        self._annotation_lookup = store.array("annotation_lookup")

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

    def annotations_by_category(self, position: int) -> dict[int, list[dict]]:
        """The entries of an image's annotations under their category ids. Raises IndexError."""
        found: dict[int, list[dict]] = defaultdict(list)
        for entry in self.annotations(position):
            found[entry["category_id"]].append(entry)
        return found

    def image_position(self, image_id: int) -> int:
        """The position of the image with this id. Raises KeyError."""
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
    """The row of the id ``wanted``. ``table``: int64 (2, n), ids in ascending order and the row of
    each. Raises KeyError."""
    ids, rows = table
    at = int(np.searchsorted(ids, wanted))
    if at == len(ids) or ids[at] != wanted:
        raise KeyError(wanted)
    return int(rows[at])


class _Spool:
    """The texts of entries, written to a temporary file in the order in which they come and copied
    to the store in another order, so that memory never holds them all."""

    def __init__(self, folder: Path):
        self._stream = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (copy closes it)
        self._ends = array("q", [0])

    def add(self, value: Any, text: str) -> None:
        # The text of an indented file, which is mostly white space, is written anew without it.
        # So is that of an entry that was changed, which comes without a text.
        is_whole = text and "\n" not in text
        blob = (text if is_whole else json.dumps(value, separators=(",", ":"))).encode()
        self._stream.write(blob)
        self._ends.append(self._ends[-1] + len(blob))

    def copy(self, store: StoreWriter, name: str, order: np.ndarray) -> None:
        with store.records(name) as records, self._stream:
            self._stream.flush()
            for row in order.tolist():
                start, end = self._ends[row], self._ends[row + 1]
                records.add(os.pread(self._stream.fileno(), end - start, start))


class _CocoParser:
    """Takes a COCO file apart: entries go to spools, and the fields by which they are sorted and
    looked up go to columns, one array for each field."""

    def __init__(self, source: Path, folder: Path, tolerant: bool):
        self.source, self.tolerant = source, tolerant
        self.bad: list[tuple[BadEntry, Any]] = []
        """Bad entries, each with the id of its image, whatever the file gives as the id."""
        self.bad_images: set[int] = set()
        self.images, self.annotations = _Spool(folder), _Spool(folder)
        self.file_names: list[str] = []
        self.image_ids, self.annotation_ids = array("q"), array("q")
        self.image_of, self.category_of, self.crowd = array("q"), array("q"), array("b")
        self.categories: list[dict] = []

    def parse(self, reader: JsonReader) -> _CocoParser:
        """Reads the whole file; returns this parser. Raises DataError, or ValueError for text that
        is no JSON."""
        take = {
            "images": self._image,
            "annotations": self._annotation,
            "categories": self._category,
        }
        missing = set(take)
        for key in reader.members() if reader.peek() == "{" else _skip_value(reader):
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
        return self

    def _refuse(self, key: str, number: int, entry: Any, reason: str) -> None:
        """Adds a bad entry to ``bad``. Raises DataError if bad entries are not tolerated, and for a
        category, without which many annotations would be bad."""
        if not self.tolerant or key == "categories":
            raise DataError(f"{self.source}: {reason}")
        entry = entry if isinstance(entry, dict) else {}
        bad = BadEntry(f"{key.removesuffix('s')} at position {number}", reason)
        if key == "annotations":
            self.bad.append((bad, as_id(entry.get("image_id"))))
            return
        self.bad.append((bad._replace(image=photo_name(entry)), None))
        if type(known := as_id(entry.get("id"))) is int:
            self.bad_images.add(known)

    def _image(self, entry: dict, text: str, where: str) -> None:
        entry, text = _plain_ids(entry, text, ("id",))
        number = _whole(entry, "id", where)
        if entry.get("file_name") is None and (name := photo_name(entry)):
            entry, text = entry | {"file_name": name}, ""
        name = _field(entry, "file_name", where)
        if not isinstance(name, str):
            raise DataError(f'{where}: "file_name" must be a text')
        for field in ("height", "width"):
            _field(entry, field, where)
        if claimed_size(entry, where) is None:
            raise DataError(f'{where}: "height" and "width" must be positive numbers of pixels')
        self.image_ids.append(number)
        self.file_names.append(name)
        self.images.add(entry, text)

    def _annotation(self, entry: dict, text: str, where: str) -> None:
        names = ("id", "image_id", "category_id")
        entry, text = _plain_ids(entry, text, names)
        number, image, category = (_whole(entry, name, where) for name in names)
        if entry.get("segmentation") in (None, [[]]):
            raise DataError(f'{where} lacks the field "segmentation": it {BOXES_ONLY}')
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise DataError(f'{where}: "iscrowd" must be 0 or 1')
        self.annotation_ids.append(number)
        self.image_of.append(image)
        self.category_of.append(category)
        self.crowd.append(int(crowd))
        self.annotations.add(entry, text)

    def refuse_unknown(self, row: int) -> None:
        """Adds the annotation of ``row``, whose image or category is not in the file, to ``bad``
        (its image may be bad itself and is in ``bad`` then). Raises DataError if bad entries are
        not tolerated."""
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

    def _category(self, entry: dict, text: str, where: str) -> None:
        entry, _ = _plain_ids(entry, text, ("id",))
        _whole(entry, "id", where)
        if not isinstance(_field(entry, "name", where), str):
            raise DataError(f'{where}: "name" must be a text')
        self.categories.append(entry)


def _skip_value(reader: JsonReader) -> tuple[()]:
    """Steps over a value of another kind than expected, which has no entries. Raises ValueError if
    it is no JSON either."""
    reader.value()
    return ()


def as_id(value: Any) -> int | str | None:
    """An id as tools write it, so that equal ones are equal: 1 for 1.0 and "1", a text for any
    other text; None for what is no id."""
    if isinstance(value, str):
        text = value.strip()
        return int(float(text)) if re.fullmatch(r"(0|[1-9]\d{0,14})(\.0)?", text) else text or None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def _plain_ids(entry: dict, text: str, names: Sequence[str]) -> tuple[dict, str]:
    """(entry, its text) with whole numbers for the ids ``names`` that mean such; a changed entry
    has no text."""
    changed = {
        name: number
        for name in names
        if type(entry.get(name)) is not int and type(number := as_id(entry.get(name))) is int
    }
    return (entry | changed, "") if changed else (entry, text)


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
    # The encoding is a guess (UTF-8 first); every guess needs a parser that has seen nothing yet.
    parser = parse_stream(
        source, lambda reader: _CocoParser(source, store.folder, tolerant).parse(reader)
    )
    image_ids = np.array(parser.image_ids)
    category_ids = _unique([c["id"] for c in parser.categories], source, "categories")
    _unique(image_ids, source, "images")
    _unique(parser.annotation_ids, source, "annotations")
    image_of, category_of = np.array(parser.image_of), np.array(parser.category_of)
    known = np.isin(image_of, image_ids) & np.isin(category_of, category_ids)
    for row in np.flatnonzero(~known):
        parser.refuse_unknown(int(row))

    by_name = sorted(range(len(image_ids)), key=parser.file_names.__getitem__)
    image_order = np.array(by_name, dtype=np.int64)
    image_lookup = _lookup_table(image_ids[image_order])
    rows = np.flatnonzero(known)
    position_of = image_lookup[1][np.searchsorted(image_lookup[0], image_of[rows])]
    # Stable: the annotations of an image keep their order in the file.
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
    store.array("annotation_lookup", _lookup_table(annotation_ids))


def _unique(ids: Any, source: Path, key: str) -> np.ndarray:
    """The ``ids`` in ascending order, int64. Raises DataError if one occurs twice."""
    ids = np.sort(np.array(ids, dtype=np.int64))
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise DataError(f'{source}: "{key}" holds the id {twice[0]} twice')
    return ids


def _lookup_table(ids: np.ndarray) -> np.ndarray:
    """What ``_look_up`` searches for the rows of ``ids``."""
    order = np.argsort(ids)
    return np.stack([ids[order], order])


Prepare = Callable[[Path, Any, int], tuple[str, Any] | None]


class RecordIndex(_Index):
    """The entries of a JSON list as records, checked and reduced to what is needed. ``names`` has
    the image name of each record; ``passed_over`` counts the entries that are none."""

    @classmethod
    def open(
        cls,
        source: str | Path,
        kind: str,
        prepare: Prepare,
        cache_dir: str | Path | None = None,
        tolerant: bool = False,
    ) -> RecordIndex:
        """``prepare(source, entry, number) -> (name, record)`` is a module's function, so that it
        can be pickled by name. It returns None for an entry to pass over, and raises a DataError,
        whose message begins with ``source``, for an entry that cannot be used. ``kind``: its name
        and version, such as "vqa-3"; a new version gets a new index. ``tolerant``: bad entries are
        left out and in ``bad``. Raises DataError, also for a JSON that is no list or an empty one.
        """
        build = partial(build_records, prepare=prepare, tolerant=tolerant)
        return cls(source, cache_dir, kind, build, tolerant)

    def _load(self, store: IndexStore) -> None:
        self.names, self._records = store.records("names"), store.records("records")
        self.passed_over: int = store.json("passed_over")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> Any:
        """Raises IndexError."""
        return self._record("_records", number)


def build_records(source: Path, store: StoreWriter, prepare: Prepare, tolerant: bool) -> None:
    """Fills ``store`` with what RecordIndex reads. Raises DataError."""
    bad: list[BadEntry] = []
    passed_over = 0

    def parse(reader: JsonReader) -> int:
        nonlocal passed_over
        count = passed_over = 0
        bad.clear()  # Those of a first guess of the encoding, which was wrong.
        entries = reader.items() if reader.peek() == "[" else _skip_value(reader)
        with store.records("names", small=True) as names, store.records("records") as records:
            for count, (entry, _) in enumerate(entries, start=1):
                try:
                    made = prepare(source, entry, count - 1)
                except DataError as error:
                    if not tolerant:
                        raise
                    reason = str(error).removeprefix(f"{source}: ")
                    bad.append(BadEntry(f"record {count - 1}", reason))
                    continue
                if made is None:
                    passed_over += 1
                    continue
                names.add(json.dumps(made[0]).encode())
                records.add(json.dumps(made[1], separators=(",", ":")).encode())
        reader.end()
        return count

    if not parse_stream(source, parse):
        raise DataError(f"{source}: must be a non-empty list of records")
    store.json("bad", bad)
    store.json("passed_over", passed_over)

"""A user's own data, in the form in which they are; docs/data.md shows each form with an example.

::

    <dataset_dir>/own/<name>/train.json, val.json …      COCO's format
    <dataset_dir>/own/<name>/{train,val,…}/*.json        labelme, one JSON beside each image
    <dataset_dir>/own/<name>/train.jsonl, val.csv …      a table, one query per row
    <dataset_dir>/own/<name>/train.parquet, val/ …       the same as Parquet, or saved by Hugging
                                                         Face datasets (own/arrow.py)

One file may hold everything: ``own/<name>.json``, ``.jsonl``, ``.csv`` or ``.parquet``, or one of
these alone in ``own/<name>/``. Its rows or images may name their ``split``; those that do not are
"train", and so is a folder of labelme JSONs without folders for splits. Images are looked for
beside the file that names them, in ``images/`` there, and in a folder named as the file without its
ending; masks beside the file and in ``masks/``.

Queries with the same text about the same image are one query whose target is the union of theirs.
A query with several separate masks has the table's ``targets``. A sample is an image with its
queries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dataset.annotations.masks import annotation_mask, draw_shape, paint_shapes, read_mask
from dataset.conversation.turns import Conversation
from dataset.conversation.wordings import answer, is_sentence
from dataset.files.errors import DataError, MissingDataError
from dataset.files.faults import Together, blame
from dataset.files.images import check_claim, image_size, read_image
from dataset.files.packed import PackedRecords
from dataset.files.paths import list_files, named_inside, require_folder, resolve_inside
from dataset.files.rle import decode_rle, rle_size
from dataset.files.text import read_json
from dataset.readers.own.arrow import (
    PARQUET,
    TableImage,
    first_pieces,
    image_named,
    is_saved,
    saved_sources,
    stem_of,
)
from dataset.readers.own.coco import is_coco, read_coco
from dataset.readers.own.formats import OwnQuery
from dataset.readers.own.labelme import read_labelme
from dataset.readers.own.tables import read_table
from dataset.readers.questions import choose_wordings, word_question
from dataset.readers.usable import is_readable, without_excluded
from dataset.sample import LoaderOptions, Sample

FOLDER = "own"
EVERYTHING = "all"  # the split that stands for all splits together
TABLES = (".jsonl", ".csv", PARQUET)

SPLITS = ("train", "val", "test")  # A single file of this name is that split and not everything.


def _file_of(folder: Path, stem: str) -> Path | None:
    """The file that holds the data or the split ``stem``, if there is one. Raises DataError for
    several."""
    paths = [folder / f"{stem}{suffix}" for suffix in (".json", *TABLES)]
    found = [path for path in paths if path.is_file()] + first_pieces(folder, stem)
    if len(found) > 1:
        raise DataError(
            f"{folder}: has {' and '.join(path.name for path in found)}; keep the one that is to be"
            " used"
        )
    return found[0] if found else None


def _is_labelme(folder: Path) -> bool:
    """Whether a folder holds JSONs that are not COCO's. Only the first one is read; a broken JSON
    counts as one of labelme."""
    first = next(iter(list_files(folder, (".json",))), None)
    if first is None:
        return False
    try:
        return not is_coco(read_json(first))
    except DataError:
        return True


def find_sources(root: Path, name: str) -> dict[str, Path]:
    """split -> file or folder of the data set ``name`` under ``root``. The split is "" if all data
    are in one place, whose rows or images may name their splits.

    Raises DataError that says what is expected, and MissingDataError that lists the data sets that
    are there.
    """
    folder = named_inside(root, name)
    single = _file_of(root, name) if root.is_dir() else None
    if single is not None:
        return {"": single}
    if not folder.is_dir():
        raise MissingDataError(
            f"{folder}: no such data set; {root} holds: {', '.join(own_names(root)) or 'none'}"
        )
    if saved := saved_sources(folder):
        return saved
    if _is_labelme(folder):
        return {"": folder}
    found: dict[str, Path] = {}
    for stem in sorted(set(map(stem_of, list_files(folder, (".json", *TABLES))))):
        if file := _file_of(folder, stem):
            found[stem] = file
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in found and (is_saved(path) or _is_labelme(path)):
            found[path.name] = path
    if not found:
        raise DataError(
            f"{folder}: holds no data; it needs train.json (COCO), train.jsonl, .csv or .parquet,"
            " or train/ with labelme JSONs"
        )
    is_everything = len(found) == 1 and not found.keys() & set(SPLITS)
    return {"": next(iter(found.values()))} if is_everything else found


def own_names(root: Path) -> list[str]:
    """The names of the data sets under ``root``."""
    if not root.is_dir():
        return []
    files = {stem_of(path) for path in list_files(root, (".json", *TABLES))}
    folders = {path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."}
    return sorted(files | folders - {"images", "masks"})


def _draw(shape: tuple[str, Any, str], size: tuple[int, int]) -> np.ndarray:
    """A shape (kind, value, item) as bool (H, W) for an image of ``size`` (H, W). Raises DataError
    that blames the item, the place in the file where the shape comes from."""
    kind, value, item = shape
    with blame(item):
        if kind == "rle":
            return decode_rle(value, size, item, "rle")
        if kind == "labelme":
            return draw_shape(value, size, item)
        if kind == "polygons":
            mask = annotation_mask(value, size, item, '"polygons"')
            if not mask.any():
                raise DataError(
                    f'{item}: "polygons" cover no pixel of their image of {size[0]}×{size[1]}'
                    " (height × width); an empty target is []"
                )
            return mask
        try:
            return read_mask(image_named(value), size)
        except DataError as error:
            raise DataError(f"{item}: {error}") from None


def _claims(queries: list[dict]) -> Iterator[tuple[int, int] | None]:
    """The sizes (H, W) of the photo, as far as its queries and their masks say."""
    for query in queries:
        yield tuple(query["size"]) if query["size"] else None
        for kind, value, _ in chain(*query["targets"], query["ignore"]):
            if kind == "rle":
                yield rle_size(value)
            elif kind == "png":
                with suppress(DataError):  # It is said where the mask is drawn.
                    yield image_size(image_named(value))


class OwnData:
    """A sample is an image with its queries; in training some are drawn."""

    def __init__(self, dataset_dir: str | Path, spec: str, options: LoaderOptions):
        """``spec``: "parts|val"; "parts" alone is its split train, "parts|all" everything.

        Every entry, and both ends of every image, are checked here. Raises DataError naming file,
        line and field.
        """
        name, _, split = spec.partition("|")
        if not name or "|" in split:
            raise ValueError(f'own data {spec!r}: write it as "name" or "name|split"')
        split = split or "train"
        self.options, self.faults = options, options.faults
        self.root = require_folder(Path(dataset_dir) / FOLDER, "the folder of your own data sets")
        self.dataset = f"{FOLDER}:{name}|{split}"
        sources = find_sources(self.root, name)
        if split == EVERYTHING:
            self._load(list(sources.values()), None)
        elif "" in sources:
            self._load([sources[""]], split)
        elif split in sources:
            self._load([sources[split]], None)
        else:
            raise MissingDataError(
                f"{self.root / name}: no split {split!r}; there are: {', '.join(sources)},"
                f" {EVERYTHING}"
            )

    def _load(self, sources: list[Path], split: str | None) -> None:
        """Reads the queries of ``split``, or all of them for None, from files or folders."""
        by_image: dict[str, list[dict]] = defaultdict(list)
        splits: set[str] = set()
        for source in sources:
            for query in self._read(source):
                if not query.is_lost:
                    splits.add(query.split)
                if split in (None, query.split):
                    # What is lost is not to be blamed again.
                    guard = self.faults.guard(self.dataset, query.item)
                    with suppress(DataError) if query.is_lost else guard:
                        image, record = self._with_files(query, source)
                        by_image[image].append(record)
        if not splits:
            raise DataError(f"{sources[0]}: holds no query that can be used")
        if split is not None and split not in splits:
            known = ", ".join([*sorted(splits), EVERYTHING])
            raise MissingDataError(
                f"{sources[0]}: no query belongs to the split {split!r}; there are: {known}"
            )
        asked = {image: _joined(queries) for image, queries in by_image.items()}
        readable = [
            image
            for image in sorted(asked)
            if asked[image] and is_readable(image_named(image), self.faults, self.dataset)
        ]
        if not readable:
            raise DataError(f"{sources[0]}: no image of {self.dataset} can be used")
        kept = without_excluded(readable, str, self.options, self.dataset)
        self.records = PackedRecords([image, asked[image]] for image in kept)

    def _with_files(self, query: OwnQuery, source: Path) -> tuple[str, dict]:
        """(image file, the query as a dict). The value of a shape that is a mask becomes its file.
        Raises DataError for an image that is not there; a query that lacks a mask is lost."""
        folders = ("images", stem_of(source))
        where = query.source or query.item
        with blame(where):
            image = self._find(source, query.image, folders, where, query.hint)
        record = asdict(query) | {"drawn": query.drawn()}
        for shapes in (*record["targets"], record["ignore"]):
            for number, (kind, value, item) in enumerate(shapes):
                if kind == "png" and not record["is_lost"]:
                    record["is_lost"] = True
                    with self.faults.guard(self.dataset, item):
                        value = str(self._find(source, value, ("masks",), item))
                        record["is_lost"] = False
                shapes[number] = (kind, value, item)
        return str(image), record

    def _read(self, source: Path) -> Iterator[OwnQuery]:
        if source.suffix in TABLES or is_saved(source):
            return read_table(source, self.faults, self.dataset)
        if source.is_dir():
            return read_labelme(source, self.faults, self.dataset, "train")
        content = read_json(source)
        if not is_coco(content):
            raise DataError(
                f'{source}: has no lists "images" and "annotations"; a file in COCO\'s format is'
                " expected here"
            )
        return read_coco(source, content, self.faults, self.dataset)

    @staticmethod
    def _find(
        source: Path, name: str, folders: tuple[str, ...], where: str, hint: str = ""
    ) -> Path | TableImage:
        """The file of that name beside ``source`` or in one of the ``folders`` there; an image
        inside a table is its own file. Raises DataError."""
        if isinstance(name, TableImage):
            return name
        beside = [source if source.is_dir() else source.parent]
        if is_saved(source):
            beside.append(source.parent)
        places = [here / folder for here in beside for folder in ("", *folders)]
        places = [place for place in places if place.is_dir()]
        try:
            paths = [resolve_inside(place, name) for place in places]
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        found = next((path for path in paths if path.exists()), None)
        if found is None:
            raise MissingDataError(
                f"{where}: {name} is not there; looked in {', '.join(map(str, places))}{hint}"
            )
        return found

    def __len__(self) -> int:
        return len(self.records)

    def path(self, index: int) -> Path:
        """The image of sample ``index``."""
        return Path(self.records[index][0])

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image ``index`` with its queries: in training some drawn at random, otherwise all,
        canonically worded."""
        name, queries = self.records[index]
        path = Path(name)
        image = read_image(image_named(name), _claims(queries))
        conversations, together = [], Together()
        for number, text in choose_wordings([q["texts"] for q in queries], self.options, rng):
            query = queries[number]
            with together.about(query["source"]):
                check_claim(query["size"], image.shape, path, query["source"])
                with blame(query["item"]):
                    conversations.append(self._conversation(query, text, image.shape[:2], rng))
        together.raise_all()
        return Sample(image, name, conversations, "reasoning", self.dataset, path.stem)

    def _conversation(
        self, query: dict, text: str, size: tuple[int, int], rng: np.random.Generator
    ) -> Conversation:
        targets, ignored = [], [_draw(shape, size) for shape in query["ignore"]]
        for shapes in query["targets"]:
            if shapes and shapes[0][0] == "painted":
                _, painted, item = shapes[0]
                target, ignore = paint_shapes(painted, size, f'{item}: "shapes"')
                ignored.append(ignore)
            else:
                target = _union([_draw(shape, size) for shape in shapes], size)
            targets.append(target)
        masks = np.stack(targets)
        ignored_pixels = _union(ignored, size) & ~masks.any(axis=0)
        # Without "is_sentence", a full stop or a question mark makes a sentence.
        is_phrase = query["is_sentence"] is not True and not is_sentence(text)
        explanations = [query["answer"]] if query["answer"] and self.options.training else []
        question, explanation = word_question(text, is_phrase, explanations, self.options, rng)
        wording = self.options.wording(rng)
        reply = answer(self.options.levels, wording, explanation, targets=len(masks))
        return Conversation(
            turns=[(question, reply)],
            masks=masks,
            ignore=ignored_pixels if ignored_pixels.any() else None,
            is_sentence=query["is_sentence"],
        )


def _union(masks: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The union of bool masks of ``size`` (H, W), of which there may be none."""
    return np.logical_or.reduce(masks) if masks else np.zeros(size, dtype=bool)


def _joined(queries: list[dict]) -> list[dict]:
    """Joins the queries of an image that have the same texts: the target becomes the union of
    theirs. Queries with several targets stay as they are. Those of which a part is lost are left
    out; a second copy of a part is no loss."""
    lost: dict[tuple[str, ...], list] = defaultdict(list)
    whole: list[dict] = []
    for query in queries:
        (lost[tuple(query["texts"])] if query["is_lost"] else whole).append(query)
    for query in whole:
        same = lost.get(tuple(query["texts"]), [])
        same[:] = [other for other in same if other["drawn"] != query["drawn"]]
    found: dict[tuple, dict] = {}
    for number, query in enumerate(q for q in whole if not lost.get(tuple(q["texts"]))):
        several = len(query["targets"]) > 1 or any(
            shape[0] == "painted" for shapes in query["targets"] for shape in shapes
        )
        key = (number,) if several else tuple(query["texts"])
        if key not in found:
            found[key] = query
            continue
        first = found[key]
        first["ignore"] += [shape for shape in query["ignore"] if shape not in first["ignore"]]
        first["targets"] = [[*first["targets"][0], *query["targets"][0]]]
        first["answer"] = first["answer"] or query["answer"]
    for query in found.values():
        del query["drawn"], query["is_lost"], query["hint"]
    return list(found.values())

"""A user's own data, in the form in which they are; docs/data.md shows each form with an example.

::

    <dataset_dir>/own/<name>/train.json, val.json …      COCO's format
    <dataset_dir>/own/<name>/{train,val,…}/*.json        labelme, one JSON beside each image
    <dataset_dir>/own/<name>/train.jsonl, val.csv …      a table, one query per row
    <dataset_dir>/own/<name>/train.parquet, val/ …       the same as Parquet, or saved by Hugging
                                                         Face datasets (own/arrow.py)

One file may hold everything: ``own/<name>.json``, ``.jsonl``, ``.csv`` or ``.parquet``, or one of
these alone in ``own/<name>/``. Its rows or images may name their ``split``; those that do not are
"train", and so is a folder of labelme JSONs without folders for splits. What annotation tools
export is read as it is (own/layouts.py, own/dialects.py). Images are looked for beside the file
that names them, in ``images/`` there, in a folder named as the file without its ending, and where
tools put them; masks beside the file and in ``masks/``.

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

from cores.dataset.annotations.masks import annotation_mask, draw_shape, paint_shapes, read_mask
from cores.dataset.conversation.turns import Conversation
from cores.dataset.conversation.wordings import answer, is_sentence
from cores.dataset.files.errors import DataError, MissingDataError
from cores.dataset.files.faults import Together, blame
from cores.dataset.files.images import check_claim, image_size, read_image
from cores.dataset.files.lookup import Identities, Lookup, parse_name
from cores.dataset.files.packed import PackedRecords
from cores.dataset.files.paths import list_files, require_folder
from cores.dataset.files.rle import decode_rle, rle_size
from cores.dataset.files.text import read_json
from cores.dataset.readers.own.arrow import TableImage, image_named, is_saved
from cores.dataset.readers.own.coco import read_coco
from cores.dataset.readers.own.dialects import as_coco, is_supervisely, read_supervisely
from cores.dataset.readers.own.formats import OwnQuery, same_words
from cores.dataset.readers.own.labelme import read_labelme
from cores.dataset.readers.own.layouts import TABLES, OwnFolder, split_of
from cores.dataset.readers.own.tables import read_table
from cores.dataset.readers.questions import choose_wordings, word_question
from cores.dataset.readers.usable import is_readable, without_excluded
from cores.dataset.sample import LoaderOptions, Sample

FOLDER = "own"
EVERYTHING = "all"  # the split that stands for all splits together


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


def _found(name: str, files: Lookup, where: str, hint: str = "") -> Path | TableImage:
    """The file that ``name`` means; an image inside a table is its own file. Raises DataError."""
    if isinstance(name, TableImage):
        return name
    try:
        return files.find(name)
    except DataError as error:
        raise type(error)(f"{where}: {error}{hint}") from None


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
        if "/" in name or "\\" in name:
            own = Path(name).name or "NAME"
            raise DataError(
                f"own data {spec!r}: a path is refused; copy or link the folder to"
                f" {self.root / own}, then give its name {own!r}"
            )
        self.folder = OwnFolder(self.root, name, options.follow_links)
        sources = self.folder.sources()
        named = split if split in sources else split_of(split)
        if split == EVERYTHING:
            self._load(sources, None)
        elif "" in sources:
            self._load(sources, split)
        elif named in sources:
            self._load({named: sources[named]}, None)
        else:
            raise MissingDataError(
                f"{self.root / name}: no split {split!r}; there are: {', '.join(sources)},"
                f" {EVERYTHING}"
            )

    def _load(self, sources: dict[str, Path], split: str | None) -> None:
        """Reads the queries of ``split``, or all of them for None, from files or folders under
        their splits."""
        by_image: dict[str, list[dict]] = defaultdict(list)
        splits: set[str] = set()
        first = next(iter(sources.values()))
        wanted = split if split is None else split_of(split)
        for named, source in sources.items():
            photos, masks = self.folder.photos(source, named), self.folder.masks(source)
            for query in self._read(source, named or "train"):
                if not query.is_lost:
                    splits.add(split_of(query.split))
                if wanted in (None, split_of(query.split)):
                    # What is lost is not to be blamed again.
                    guard = self.faults.guard(self.dataset, query.item)
                    with suppress(DataError) if query.is_lost else guard:
                        image, record = self._with_files(query, photos, masks)
                        by_image[image].append(record)
        if not splits:
            raise DataError(
                f"{first}: holds no query that can be used; add some, or remove it if it is to be"
                " empty"
            )
        if wanted is not None and wanted not in splits:
            known = ", ".join([*sorted(splits), EVERYTHING])
            raise MissingDataError(
                f"{first}: no query belongs to the split {split!r}; there are: {known}"
            )
        asked = {image: _joined(queries) for image, queries in by_image.items()}
        readable = [
            image
            for image in sorted(asked)
            if asked[image]
            and is_readable(image_named(image), self.faults, self.dataset)
            and self._is_one(image, by_image[image])
        ]
        if not readable:
            raise DataError(f"{first}: no image of {self.dataset} can be used")
        kept = without_excluded(readable, str, self.options, self.dataset)
        self.identities = Identities(kept)
        self.records = PackedRecords([image, asked[image]] for image in kept)

    def _with_files(self, query: OwnQuery, photos: Lookup, masks: Lookup) -> tuple[str, dict]:
        """(image file, the query as a dict). The value of a shape that is a mask becomes its file.
        Raises DataError for an image that is not there; a query that lacks a mask is lost."""
        where = query.source or query.item
        with blame(where):
            image = _found(query.image, photos, where, query.hint)
        record = asdict(query) | {"drawn": query.drawn()}
        for shapes in (*record["targets"], record["ignore"]):
            for number, (kind, value, item) in enumerate(shapes):
                if kind == "png" and not record["is_lost"]:
                    record["is_lost"] = True
                    with self.faults.guard(self.dataset, item):
                        value = str(_found(value, masks, item))
                        if value == str(image):
                            raise DataError(f"{item}: {value} is the image and its mask")
                        record["is_lost"] = False
                shapes[number] = (kind, value, item)
        return str(image), record

    def _is_one(self, image: str, records: list[dict]) -> bool:
        """Whether all ``records`` that led to the file mean one image, so that none lacks the
        objects of another. Raises DataError unless bad items are tolerated."""
        with self.faults.guard(self.dataset, image):
            entries = sorted({record["entry"] for record in records if record["entry"]})
            if len(entries) > 1:
                raise DataError(
                    f"{image}: is the file of {' and of '.join(entries)}; give all its annotations"
                    " one image"
                )
            names = sorted({record["image"] for record in records})
            if len(names) > 1 and any(parse_name(name).is_foreign for name in names):
                raise DataError(
                    f"{image}: {' and '.join(names)} may both mean it; write its name as it is here"
                )
            return True
        return False

    def _read(self, source: Path, split: str) -> Iterator[OwnQuery]:
        if source.suffix in TABLES or is_saved(source):
            return read_table(source, self.faults, self.dataset)
        if source.is_dir():
            first = list_files(source, (".json",), self.options.follow_links)[0]
            is_foreign = source.name == "ann" and is_supervisely(read_json(first))
            read = read_supervisely if is_foreign else read_labelme
            return read(source, self.faults, self.dataset, split)
        content = as_coco(source, read_json(source))
        return read_coco(source, content, self.faults, self.dataset)

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
        id = self.identities.of(name)
        return Sample(image, name, conversations, "reasoning", self.dataset, id)

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
        (lost[same_words(query["texts"])] if query["is_lost"] else whole).append(query)
    for query in whole:
        same = lost.get(same_words(query["texts"]), [])
        same[:] = [other for other in same if other["drawn"] != query["drawn"]]
    found: dict[tuple, dict] = {}
    for number, query in enumerate(q for q in whole if not lost.get(same_words(q["texts"]))):
        several = len(query["targets"]) > 1 or any(
            shape[0] == "painted" for shapes in query["targets"] for shape in shapes
        )
        key = (number,) if several else same_words(query["texts"])
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

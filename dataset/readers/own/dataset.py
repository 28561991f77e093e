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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dataset.conversation.turns import Conversation
from dataset.conversation.wordings import answer
from dataset.files.errors import DataError, MissingDataError
from dataset.files.faults import blame
from dataset.files.images import check_size, read_image, read_label
from dataset.files.lookup import Identities, Lookup, parse_name
from dataset.files.packed import PackedRecords
from dataset.files.paths import list_files, require_folder
from dataset.files.rle import decode_rle
from dataset.files.text import read_json
from dataset.readers.coco import annotation_mask
from dataset.readers.own.arrow import TableImage, image_named, is_saved
from dataset.readers.own.coco import read_coco
from dataset.readers.own.dialects import as_coco, is_supervisely, read_supervisely
from dataset.readers.own.formats import OwnQuery
from dataset.readers.own.labelme import draw_labelme, read_labelme
from dataset.readers.own.layouts import TABLES, OwnFolder, split_of
from dataset.readers.own.tables import read_table
from dataset.readers.questions import choose_wordings, word_question
from dataset.readers.reasoning import paint_shapes
from dataset.readers.usable import is_readable, without_excluded
from dataset.sample import LoaderOptions, Sample

FOLDER = "own"
EVERYTHING = "all"  # the split that stands for all splits together


def _read_mask(path: Path | TableImage) -> np.ndarray:
    """A mask file as bool (H, W): 0 is background, one other value is the target."""
    label = read_label(path)
    values = np.unique(label[label != 0])
    if len(values) > 1:
        raise DataError(
            f"{path}: holds {len(values)} values besides 0; a mask has one, so write one PNG per"
            " target"
        )
    return label != 0


def _draw_shape(shape: tuple[str, Any, str], size: tuple[int, int]) -> np.ndarray:
    """A shape (kind, value, item) as bool (H, W) for an image of ``size`` (H, W). Raises DataError
    that blames the item, the place in the file where the shape comes from."""
    kind, value, item = shape
    with blame(item):
        if kind == "rle":
            return decode_rle(value, size, item, "rle")
        if kind == "labelme":
            return draw_labelme(value, size, item)
        if kind == "polygons":
            return annotation_mask(value, size, item, '"polygons"')
        try:
            mask = _read_mask(image_named(value))
            check_size(mask.shape, size, value, "the mask")
        except DataError as error:
            raise DataError(f"{item}: {error}") from None
        return mask


def _with_files(query: OwnQuery, photos: Lookup, masks: Lookup) -> tuple[str, dict]:
    """(image file, the query as a dict). Its shapes become (kind, value, item), where a mask's
    value is its file. Raises DataError for files that are not there."""

    def find(name: str, files: Lookup) -> Path | TableImage:
        if isinstance(name, TableImage):
            return name  # An image inside a table is its own file.
        try:
            return files.find(name)
        except DataError as error:
            raise type(error)(f"{query.item}: {error}") from None

    image, record = find(query.image, photos), asdict(query)
    for shapes in (*record["targets"], record["ignore"]):
        for number, (kind, value) in enumerate(shapes):
            if kind == "png":
                value = str(find(value, masks))
                if value == str(image):
                    raise DataError(f"{query.item}: {value} is the image and its mask")
            shapes[number] = (kind, value, query.item)
    return str(image), record


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
                splits.add(split_of(query.split))
                if wanted in (None, split_of(query.split)):
                    with self.faults.guard(self.dataset, query.item):
                        image, record = _with_files(query, photos, masks)
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
        readable = [
            image
            for image in sorted(by_image)
            if is_readable(image_named(image), self.faults, self.dataset)
            and self._is_one(image, by_image[image])
        ]
        if not readable:
            raise DataError(f"{first}: no image of {self.dataset} can be used")
        kept = without_excluded(readable, str, self.options, self.dataset)
        self.identities = Identities(kept)
        self.records = PackedRecords([image, _joined(by_image[image])] for image in kept)

    def _is_one(self, image: str, records: list[dict]) -> bool:
        """Whether all ``records`` that led to the file mean one image, so that none lacks the
        objects of another. Raises DataError unless bad items are tolerated."""
        with self.faults.guard(self.dataset, image):
            entries = sorted({record["entry"] for record in records})
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
        image = read_image(image_named(name))
        conversations = []
        for number, text in choose_wordings([q["texts"] for q in queries], self.options, rng):
            query = queries[number]
            with blame(query["item"]):
                conversations.append(self._conversation(query, text, path, image.shape[:2], rng))
        id = self.identities.of(name)
        return Sample(image, name, conversations, "reasoning", self.dataset, id)

    def _conversation(
        self, query: dict, text: str, image: Path, size: tuple[int, int], rng: np.random.Generator
    ) -> Conversation:
        if query["size"] is not None:
            check_size(tuple(query["size"]), size, image, f"the size in {query['item']}")
        targets, ignored = [], [_draw_shape(shape, size) for shape in query["ignore"]]
        for shapes in query["targets"]:
            if shapes and shapes[0][0] == "painted":
                target, ignore = paint_shapes(shapes[0][1], size)
                ignored.append(ignore)
            else:
                target = _union([_draw_shape(shape, size) for shape in shapes], size)
            targets.append(target)
        masks = np.stack(targets)
        ignored_pixels = _union(ignored, size) & ~masks.any(axis=0)
        # Without "is_sentence", a full stop or a question mark makes a sentence.
        is_phrase = query["is_sentence"] is not True and text[-1] not in ".?!"
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
    theirs. Queries with several targets stay as they are."""
    found: dict[tuple, dict] = {}
    for number, query in enumerate(queries):
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
    return list(found.values())

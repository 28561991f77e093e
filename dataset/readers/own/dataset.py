"""Your own data, in the form in which you have them; docs/data.md shows each with an example.

::

    <dataset_dir>/own/<name>/train.json, val.json …       COCO's format
    <dataset_dir>/own/<name>/{train,val,…}/*.json         labelme, one JSON per image, beside the images
    <dataset_dir>/own/<name>/train.jsonl, val.csv …       a table, one query per row
    <dataset_dir>/own/<name>/train.parquet, val/ …        the same as Parquet, or saved by Hugging Face datasets (own_arrow.py)

One file may hold everything: ``own/<name>.json``, ``.jsonl``, ``.csv`` or ``.parquet``, or one of
these alone in ``own/<name>/``. Its rows or images may name their ``split``; those that do not are
"train", and so is a folder of labelme JSONs without folders for splits. Images are looked for
beside the file that names them, in ``images/`` there, and in a folder named as the file without its
ending; masks beside the file and in ``masks/``.

Queries with the same text about the same image are one query; its target is the union. Separate
masks for one query are the table's ``targets``. A sample is an image with its queries.
"""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset.conversation.turns import Conversation
from dataset.conversation.wordings import (
    answer,
    explain_question,
    phrase_question,
    sentence_question,
)
from dataset.files.errors import DataError, MissingDataError
from dataset.files.faults import blame
from dataset.files.images import check_size, probe_images, read_image, read_label
from dataset.files.packed import PackedRecords
from dataset.files.paths import list_files, named_inside, require_folder, resolve_inside
from dataset.files.rle import decode_rle
from dataset.files.text import read_json
from dataset.readers.coco import annotation_mask
from dataset.readers.exclusion import without_excluded
from dataset.readers.own.arrow import (
    PARQUET,
    Cell,
    first_pieces,
    is_saved,
    picture,
    saved_sources,
    stem_of,
)
from dataset.readers.own.coco import is_coco, read_coco
from dataset.readers.own.formats import Query
from dataset.readers.own.labelme import read_labelme
from dataset.readers.own.tables import read_table
from dataset.readers.reasoning import paint_shapes
from dataset.sample import LoaderOptions, Sample, draw_queries

FOLDER = "own"
EVERYTHING = "all"  # the split that is all of them
TABLES = (".jsonl", ".csv", PARQUET)


# ------------------------------------------------------------------------------------ finding files


def _lies_here(folder: Path, stem: str) -> Path | None:
    found = [
        folder / f"{stem}{suffix}"
        for suffix in (".json", *TABLES)
        if (folder / f"{stem}{suffix}").is_file()
    ]
    found += first_pieces(folder, stem)
    if len(found) > 1:
        raise DataError(
            f"{folder}: has {' and '.join(path.name for path in found)}; keep the one that is to be"
            " used"
        )
    return found[0] if found else None


def _is_labelme(folder: Path) -> bool:
    """Whether a folder holds JSONs that are not COCO's. Only the first one is looked into; a broken
    one is no COCO file."""
    first = next(iter(list_files(folder, (".json",))), None)
    if first is None:
        return False
    try:
        return not is_coco(read_json(first))
    except DataError:
        return True


def find_sources(root: Path, name: str) -> dict[str, Path]:
    """split -> file or labelme folder of the data set ``name`` under ``root``; "" stands for one
    that has no splits of its own.

    Raises DataError that says what is expected, and MissingDataError that lists the data sets that
    are there.
    """
    folder = named_inside(root, name)
    alone = _lies_here(root, name) if root.is_dir() else None
    if alone is not None:
        return {"": alone}
    if not folder.is_dir():
        raise MissingDataError(
            f"{folder}: no such data set; {root} holds: {', '.join(own_names(root)) or 'none'}"
        )
    if saved := saved_sources(folder):
        return saved
    if _is_labelme(folder):
        return {"": folder}
    files = list_files(folder, (".json", *TABLES))
    found = {stem: _lies_here(folder, stem) for stem in sorted(set(map(stem_of, files)))}
    found |= {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_dir() and path.name not in found and (is_saved(path) or _is_labelme(path))
    }
    if not found:
        raise DataError(
            f"{folder}: holds no data; it needs train.json (COCO), train.jsonl, .csv or .parquet,"
            " or train/ with labelme JSONs"
        )
    return (
        {"": next(iter(found.values()))}
        if len(found) == 1 and next(iter(found)) not in SPLITS
        else found
    )


SPLITS = ("train", "val", "test")  # a single file of this name is that split and not the whole


def own_names(root: Path) -> list[str]:
    """The data sets under ``root``."""
    if not root.is_dir():
        return []
    files = [stem_of(path) for path in list_files(root, (".json", *TABLES))]
    reserved = {"images", "masks", *files}
    folders = {
        path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
    }
    return sorted({*files, *(folders - reserved)})


# ------------------------------------------------------------------------------------------ drawing


def _labelme_stencil(shape: dict, size: tuple[int, int], where: str) -> np.ndarray:
    """One labelme shape as bool (H, W): outline and inside, coordinates cut to whole pixels as in
    ReasonSeg."""
    if "mask" in shape:
        return _labelme_pixels(shape, size, where)
    return paint_shapes([{"label": "target", "points": shape["points"]}], size)[0]


def _labelme_pixels(shape: dict, size: tuple[int, int], where: str) -> np.ndarray:
    """labelme's "mask": a PNG of the box between the two points, both inside."""
    try:
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(shape["mask"]))).convert("L")) > 0
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(
            f'{where}: the PNG in a shape\'s "mask" is broken ({" ".join(str(error).split())})'
        ) from None
    x0, y0 = (int(v) for v in np.min(shape["points"], axis=0))
    height, width = pixels.shape
    if min(x0, y0) < 0 or y0 + height > size[0] or x0 + width > size[1]:
        raise DataError(
            f'{where}: a shape\'s "mask" of {height}×{width} pixels at ({x0}, {y0}) leaves the'
            " image"
        )
    mask = np.zeros(size, dtype=bool)
    mask[y0 : y0 + height, x0 : x0 + width] = pixels
    return mask


def _read_mask(path: Path | Cell) -> np.ndarray:
    """A mask file as bool (H, W): 0 is background, one other value the target."""
    label = read_label(path)
    values = np.unique(label[label != 0])
    if len(values) > 1:
        raise DataError(
            f"{path}: holds {len(values)} values besides 0; a mask has one, so write one PNG per"
            " target"
        )
    return label != 0


def _draw(shape: tuple[str, Any, str], size: tuple[int, int]) -> np.ndarray:
    """One shape of a Query, with the item that it belongs to, as bool (H, W). Raises DataError that
    blames the item."""
    kind, value, item = shape
    with blame(item):
        if kind == "rle":
            return decode_rle(value, size, item, "rle")
        if kind == "labelme":
            return _labelme_stencil(value, size, item)
        if kind == "polygons":
            return annotation_mask(value, size, item, '"polygons"')
        try:
            mask = _read_mask(picture(value))
            check_size(mask.shape, size, value, "the mask")
        except DataError as error:
            raise DataError(f"{item}: {error}") from None
        return mask


# ------------------------------------------------------------------------------------------- loader


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
        """``split``: only queries that name it; None: all."""
        by_image: dict[str, list[dict]] = defaultdict(list)
        splits: set[str] = set()
        for source in sources:
            for query in self._read(source):
                splits.add(query.split)
                if split in (None, query.split):
                    with self.faults.guard(self.dataset, query.item):
                        image, record = self._with_files(query, source)
                        by_image[image].append(record)
        if not splits:
            raise DataError(f"{sources[0]}: holds no query that can be used")
        if split is not None and split not in splits:
            known = ", ".join([*sorted(splits), EVERYTHING])
            raise MissingDataError(
                f"{sources[0]}: no query belongs to the split {split!r}; there are: {known}"
            )
        kept = [image for image in sorted(by_image) if self._is_usable(picture(image))]
        if not kept:
            raise DataError(f"{sources[0]}: no image of {self.dataset} can be used")
        kept = without_excluded(kept, kept, self.options, self.dataset)
        self.records = PackedRecords([image, _joined(by_image[image])] for image in kept)

    def _with_files(self, query: Query, source: Path) -> tuple[str, dict]:
        """(image file, the query with mask files instead of their names). Raises DataError for what
        is not there."""
        image = self._find(source, query.image, ("images", stem_of(source)), query.item)
        record = asdict(query)
        for shapes in (*record["targets"], record["ignore"]):
            for number, (kind, value) in enumerate(shapes):
                found = (
                    str(self._find(source, value, ("masks",), query.item))
                    if kind == "png"
                    else value
                )
                shapes[number] = (kind, found, query.item)
        return str(image), record

    def _read(self, source: Path) -> Iterator[Query]:
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
    def _find(source: Path, name: str, folders: tuple[str, ...], where: str) -> Path | Cell:
        """The file of that name beside ``source`` or in one of the folders there. Raises
        DataError."""
        if isinstance(name, Cell):
            return name
        beside = (
            [source, source.parent]
            if is_saved(source)
            else [source if source.is_dir() else source.parent]
        )
        places = [
            place
            for here in beside
            for place in (here, *(here / folder for folder in folders))
            if place.is_dir()
        ]
        try:
            paths = [resolve_inside(place, name) for place in places]
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        found = next((path for path in paths if path.exists()), None)
        if found is None:
            raise MissingDataError(
                f"{where}: {name} is not there; looked in {', '.join(map(str, places))}"
            )
        return found

    def _is_usable(self, image: Path | Cell) -> bool:
        if self.faults.skips(self.dataset, image):
            return False
        with self.faults.guard(self.dataset, image):
            probe_images([image])
            return True
        return False

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
        image = read_image(picture(name))
        conversations = []
        for number, text in self._choose(queries, rng):
            query = queries[number]
            with blame(query["item"]):
                conversations.append(self._conversation(query, text, path, image.shape[:2], rng))
        return Sample(image, name, conversations, "reasoning", self.dataset, path.stem)

    def _choose(self, queries: list[dict], rng: np.random.Generator) -> list[tuple[int, str]]:
        """(index of a query, one of its wordings) pairs; every query once before any is asked again
        in other words."""
        if not self.options.training:
            count = 1 if self.options.texts == "first" else None
            return [
                (number, text)
                for number, query in enumerate(queries)
                for text in query["texts"][:count]
            ]
        return draw_queries(
            [query["texts"] for query in queries], self.options.num_classes_per_sample, rng
        )

    def _conversation(
        self, query: dict, text: str, image: Path, size: tuple[int, int], rng: np.random.Generator
    ) -> Conversation:
        if query["size"] is not None:
            check_size(tuple(query["size"]), size, image, f"the size in {query['item']}")
        targets, ignored = [], [_draw(shape, size) for shape in query["ignore"]]
        for shapes in query["targets"]:
            if shapes and shapes[0][0] == "painted":
                target, ignore = paint_shapes(shapes[0][1], size)
                ignored.append(ignore)
            else:
                target = _union([_draw(shape, size) for shape in shapes], size)
            targets.append(target)
        stack = np.stack(targets)
        ignore = _union(ignored, size) & ~stack.any(axis=0)
        question, explanation = self._question(query, text, rng)
        reply = answer(
            self.options.levels, self.options.wording(rng), explanation, targets=len(stack)
        )
        return Conversation(
            [(question, reply)],
            stack,
            ignore if ignore.any() else None,
            is_sentence=query["is_sentence"],
        )

    def _question(self, query: dict, text: str, rng: np.random.Generator) -> tuple[str, str | None]:
        """(question, explanation or None). Without "is_sentence", a full stop or a question mark
        makes a sentence."""
        is_phrase = query["is_sentence"] is not True and text[-1] not in ".?!"
        if query["answer"] and self.options.training and rng.random() < self.options.explanatory:
            return (
                explain_question(f"What is {text} in this image?" if is_phrase else text, rng),
                query["answer"],
            )
        return (phrase_question if is_phrase else sentence_question)(
            text, self.options.wording(rng)
        ), None


def _union(masks: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    return np.logical_or.reduce(masks) if masks else np.zeros(size, dtype=bool)


def _joined(queries: list[dict]) -> list[dict]:
    """Queries with the same texts become one: its target is the union. Those with several targets
    stay as they are."""
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
        first["ignore"] = [
            *first["ignore"],
            *(shape for shape in query["ignore"] if shape not in first["ignore"]),
        ]
        first["targets"] = [[*first["targets"][0], *query["targets"][0]]]
        first["answer"] = first["answer"] or query["answer"]
    return list(found.values())

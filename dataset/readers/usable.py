"""Which entries of a data set a loader uses: those whose image may be trained on, is there, and has
only sound annotations.

--exclude_val leaves photos that are validated on out of training, whatever data set they come with.
COCO's photos are used again and again: those of refCOCO's val and test splits are training images
of COCO, COCO-Stuff, PACO, LLaVA-Instruct and LLM-Seg40K. All of these name a photo by COCO's
number.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from cores.dataset.files.errors import DataError, MissingDataError
from cores.dataset.files.faults import Faults
from cores.dataset.files.images import EmbeddedImage, probe_images
from cores.dataset.files.index import CocoIndex, RecordIndex
from cores.dataset.files.lookup import Lookup, base_name
from cores.dataset.sample import LoaderOptions

logger = logging.getLogger(__name__)

# 000000581857.jpg · COCO_train2014_000000581857.jpg · train2017/000000581857.jpg
_COCO_NAME = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})")
Entry = TypeVar("Entry")


def coco_number(file_name: str) -> int | None:
    """COCO's number of a photo, the same in its releases of 2014 and 2017; None for a name that is
    not COCO's."""
    found = _COCO_NAME.fullmatch(PurePosixPath(base_name(file_name)).stem)
    return int(found[1]) if found else None


def is_readable(image: Path | EmbeddedImage, faults: Faults, dataset: str) -> bool:
    """Whether an image is not on the skip list and both ends of its file are sound. Raises
    DataError for a broken one unless ``faults`` tolerate it."""
    if faults.skips(dataset, str(image)):
        return False
    with faults.guard(dataset, str(image)):
        probe_images([image])
        return True
    return False


def without_excluded(
    entries: Sequence[Entry], name_of: Callable[[Entry], str], options: LoaderOptions, dataset: str
) -> Sequence[Entry]:
    """The ``entries`` that --exclude_val leaves; logs how many it left out. ``name_of``: the image
    of an entry. Raises DataError if none is left."""
    if not options.excluded_coco:
        return entries
    kept = [e for e in entries if coco_number(name_of(e)) not in options.excluded_coco]
    left_out, total = len(entries) - len(kept), len(entries)
    logger.info("--exclude_val: %s: %d of %d entries are left out", dataset, left_out, total)
    if not kept:
        raise DataError(
            f"{dataset}: --exclude_val leaves none of its {total} entries; leave the data set or"
            " the flag out"
        )
    return kept


def without_missing(
    entries: Sequence[Entry],
    name_of: Callable[[Entry], str],
    photos: Lookup,
    source: Path,
    options: LoaderOptions,
    dataset: str,
) -> Sequence[Entry]:
    """The ``entries`` whose image (``name_of``) is among ``photos``, without those on the skip
    list.

    Raises MissingDataError for the first image that is not there; with ``options.skip_missing`` it
    logs how many are not, and raises only if none is left.
    """
    faults, folder = options.faults, photos.places[0]
    if faults.has_skip_list:
        entries = [e for e in entries if not faults.skips(dataset, photos.item(name_of(e)))]
    names = [name_of(entry) for entry in entries]
    missing = photos.missing(names)
    if not missing:
        return entries
    first = next(iter(missing))
    reason = "" if missing[first].startswith(f"{first} is not there") else f" ({missing[first]})"
    message = (
        f"{source}: {len(missing)} of {len(names)} images are not in {folder}, for example"
        f" {first}{reason}"
    )
    if not options.skip_missing:
        raise MissingDataError(f"{message}; restore them or set --on_bad_sample skip")
    logger.warning("%s; their entries are left out", message)
    bad = []
    for name, why in missing.items():
        item = photos.item(name)
        plain = why.startswith(f"{name} is not there") and len(photos.places) == 1
        bad.append((item, f"{item}: {'image does not exist' if plain else why}"))
    faults.note_all(dataset, bad)
    kept = [entry for entry, name in zip(entries, names, strict=True) if name not in missing]
    if not kept:
        raise MissingDataError(f"{message}; nothing is left to load")
    return kept


def usable_positions(
    index: CocoIndex | RecordIndex,
    positions: Sequence[int],
    name_of: Callable[[int], str],
    photos: Lookup,
    options: LoaderOptions,
    dataset: str,
) -> np.ndarray:
    """The ``positions`` in ``index``, int64, whose image may be trained on, is among ``photos``
    and has no bad entry. ``name_of``: the name of the image at a position.

    Raises DataError if none is left, and as ``without_missing`` does.
    """
    positions = _without_bad(index, positions, name_of, photos, options, dataset)
    positions = without_excluded(positions, name_of, options, dataset)
    positions = without_missing(positions, name_of, photos, index.source, options, dataset)
    if isinstance(index, CocoIndex):
        positions = _without_twins(index, positions, name_of, photos, options, dataset)
    if not len(positions):
        raise DataError(
            f"{index.source}: --skip_list leaves nothing of {dataset}; leave the data set out"
        )
    return np.array(positions, dtype=np.int64)


def _without_twins(
    index: CocoIndex,
    positions: Sequence[int],
    name_of: Callable[[int], str],
    photos: Lookup,
    options: LoaderOptions,
    dataset: str,
) -> Sequence[int]:
    """``positions`` without images that share their file, of whose objects each has a part only."""
    counts = Counter(map(name_of, positions))
    if len(counts) == len(positions):
        return positions
    ids: dict[str, list[str]] = {name: [] for name, count in counts.items() if count > 1}
    for position in positions:
        if (name := name_of(position)) in ids:
            ids[name].append(str(index.image(position)["id"]))
    bad_items = [
        (
            photos.item(name),
            f"{index.source}: {name} is the file of the images {' and '.join(numbers)}; give all"
            " its annotations one image",
        )
        for name, numbers in ids.items()
    ]
    options.faults.leave_out(dataset, bad_items)
    return [position for position in positions if name_of(position) not in ids]


def _without_bad(
    index: CocoIndex | RecordIndex,
    positions: Sequence[int],
    name_of: Callable[[int], str],
    photos: Lookup,
    options: LoaderOptions,
    dataset: str,
) -> Sequence[int]:
    """``positions`` without the images of bad entries: with one annotation less, a question about
    such an image could have a wrong mask."""
    if not index.bad:
        return positions
    images = {bad.image for bad in index.bad}
    gone: dict[int, str] = {}
    if isinstance(index, CocoIndex):  # A bad entry of a RecordIndex has no position.
        names = index.file_names
        gone = {position: names[position] for position in positions if names[position] in images}
    # The image may lie elsewhere than its annotations say, in a folder of its synset.
    files = {name: name_of(position) for position, name in gone.items()}
    bad_items = [
        (
            photos.item(files.get(bad.image, bad.image))
            if bad.image
            else f"{index.source}:{bad.place}",
            f"{index.source}: {bad.reason}",
        )
        for bad in index.bad
    ]
    options.faults.leave_out(dataset, bad_items)
    kept = [position for position in positions if position not in gone]
    if not kept:
        raise DataError(f"{index.source}: no entry of {dataset} can be used{index.example()}")
    return kept

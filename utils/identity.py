"""What a run is made of besides its settings: frozen weights, data, versions.

Settings say where weights and data lie; what lies there may be replaced. So each checkpoint has an
identity.json with hashes of samples of it. Going on compares all of it, merging and evaluating the
weights; what changed is refused by name, and --accept_changes goes on.

It is cheap: of every tensor, or of a file, some values are read; of a data set the names of NAMES
images, the sizes of SIZES of them and of the JSONs beside them, and SAMPLES samples with their
words and masks. A change that touches none of these is not found.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cores.dataset.files.errors import DataError
from cores.dataset.files.sealed import read_sealed
from cores.dataset.mixture import EvalDataset, TrainMixture
from cores.dataset.registry import Loader
from cores.model.checkpoints.source import Kind, Source, open_source
from cores.utils import distributed
from cores.utils.report.results import versions
from cores.utils.settings.arguments import Settings
from cores.utils.settings.flags import UsageError

logger = logging.getLogger(__name__)

IDENTITY = "identity.json"
NAMES, SIZES, SAMPLES = 20_000, 2000, 8
VALUES, BLOCKS, BLOCK = 63, 1024, 512
PROGRAM = Path(__file__).resolve().parents[1]


def of_weights(s: Settings, source: Source) -> dict[str, str]:
    """Flag that names frozen weights -> hash of them. ``source``: of --version. Every rank calls
    it; raises UsageError on all where a file cannot be read."""

    def hashes() -> dict[str, str]:
        found = {"version": of_tensors(source.weights)}
        theirs = source.kind in (Kind.PUBLISHED_LLAVA, Kind.PUBLISHED_CORES)
        if theirs and not any(".vision_tower." in name for name in source.weights):
            found["vision_tower"] = of_tensors(source.tower.weights)
        if s.vision_pretrained and not source.finished:
            sam = Path(s.vision_pretrained)
            found["vision_pretrained"] = of_file(sam / "sam.safetensors" if sam.is_dir() else sam)
        if s.features_pretrained and not source.finished:
            found["features_pretrained"] = of_tensors(open_source(s.features_pretrained).weights)
        return found

    return _once(hashes)


def of_run(s: Settings, source: Source, data: TrainMixture, val: EvalDataset | None) -> dict:
    """The identity of a training. Every rank calls it."""
    loaders = {f"{loader.dataset}": loader for family in data.families for loader in family}
    if val is not None:
        loaders[f"{s.val_dataset} (validation)"] = val.loader
    root = Path(s.dataset_dir)
    read = _once(lambda: {name: of_data(loader, root) for name, loader in loaders.items()})
    # The local part of "2.14.1+cpu" says for which device it was built.
    found = {name: version.split("+")[0] for name, version in versions().items()}
    return {
        "weights": of_weights(s, source),
        "data": read,
        "versions": found | {"program": _of_program()},
    }


def of_tensors(weights: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and some values, the same for any file format and number of shards,
    and for a wider float type."""
    digest = hashlib.blake2b(digest_size=10)
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = tensor.reshape(-1)
        third, middle = VALUES // 3, max(0, len(flat) // 2)
        parts = [flat[:third], flat[middle : middle + third], flat[-third:]]
        digest.update(torch.cat(parts).to(torch.float64).numpy().tobytes())
    return digest.hexdigest()


def of_file(path: Path) -> str:
    """A hash of the size and of BLOCKS blocks of a file; of all of a small one."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=10)
    with path.open("rb") as stream:
        for start in _spread(-(-size // BLOCK), BLOCKS):
            stream.seek(start * BLOCK)
            digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def of_data(loader: Loader, root: Path) -> dict[str, Any]:
    """Number of images, and a hash of names, sizes and some samples. Names are relative to
    ``root``, the data folder, which may be moved."""
    digest = hashlib.blake2b(digest_size=10)
    for index in _spread(len(loader), NAMES):
        digest.update(str(loader.path(index)).removeprefix(str(root)).encode("utf-8", "replace"))
    for index in _spread(len(loader), SIZES):
        image = Path(loader.path(index))
        digest.update(repr([_size(image), _size(image.with_suffix(".json"))]).encode())
    for index in _spread(len(loader), SAMPLES):
        try:
            sample = loader.sample(index, np.random.default_rng(0))
        except DataError:  # It is reported when it is drawn.
            continue
        digest.update(sample.image.tobytes())
        for conversation in sample.conversations:
            digest.update(repr(conversation.turns).encode("utf-8", "replace"))
            digest.update(np.packbits(conversation.masks).tobytes())
    source = getattr(getattr(loader, "index", None), "source", None)
    if isinstance(source, Path) and source.is_file():
        digest.update(of_file(source).encode())
    return {"images": len(loader), "hash": digest.hexdigest()}


def _size(file: Path) -> int:
    """In bytes; -1 if there is no such file, as for a picture inside a table."""
    try:
        return file.stat().st_size
    except OSError:
        return -1


def _spread(count: int, most: int) -> Iterable[int]:
    """At most so many of ``range(count)``, evenly spaced, the last one among them."""
    if count <= most:
        return range(count)
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _of_program() -> str:
    digest = hashlib.blake2b(digest_size=10)
    folders = (PROGRAM / name for name in ("dataset", "model", "utils"))
    for file in sorted(file for folder in folders for file in folder.rglob("*.py")):
        digest.update(file.relative_to(PROGRAM).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def _once(work: Callable[[], dict]) -> dict:
    """What ``work`` gives on the main rank, on every rank, or its error as a UsageError."""
    found: list[tuple[dict, str]] = []
    if distributed.is_main():
        try:
            found = [(work(), "")]
        except (OSError, ValueError) as error:
            found = [({}, str(error))]
    content, fault = distributed.gather_lists(found)[0]
    if fault:
        raise UsageError(fault)
    return content


def refuse_changes(
    folder: Path, now: Mapping[str, Mapping[str, Any]], s: Settings, doing: str
) -> None:
    """Raises UsageError naming what is another than when the checkpoint ``folder`` was saved, in
    the parts that ``now`` has; says so instead with --accept_changes. ``doing``: what is refused,
    in words. Every rank calls it."""
    try:
        before = read_sealed(folder / IDENTITY)
    except FileNotFoundError:
        if distributed.is_main():
            words = "%s: an older checkpoint without identity.json; whether %s are still those of"
            logger.warning(words + " the training is not known", folder, " and ".join(now))
        return
    except ValueError as error:
        raise UsageError(str(error)) from None
    changes = []
    for part, values in now.items():
        known = before.get(part)
        for name, value in values.items():
            if isinstance(known, dict) and name in known and known[name] != value:
                changes.append(_change(part, name, known[name], value, s))
    if not changes:
        return
    listed = f"{folder}: {'; '.join(changes)}"
    if not s.accept_changes:
        raise UsageError(
            f"{listed}; {doing} would give something else than the run says. Restore it, or add"
            " --accept_changes"
        )
    if distributed.is_main():
        logger.warning("%s; accepted", listed)


def _change(part: str, name: str, before: Any, now: Any, s: Settings) -> str:
    if part == "weights":
        return f"the weights of --{name} {getattr(s, name)} are not those that it was trained on"
    if part == "data":
        counts = [
            found.get("images") if isinstance(found, dict) else "?" for found in (before, now)
        ]
        what = f"had {counts[0]} images and now has {counts[1]}"
        return f"{name} {what if counts[0] != counts[1] else 'has other content than it had'}"
    if name == "program":
        return "the program is another version"
    return f"{name} was {before} and is {now}"

"""Weights of a folder, by name, from every layout that transformers writes: one file or shards;
and the other files of a model folder, read so that whatever is in them ends in one line."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError  # Raised by torch.load(weights_only=True).
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

SINGLE = ("model.safetensors", "pytorch_model.bin")
"""The file of weights that is not cut into shards, in the order in which transformers looks."""
# What wrappers of training leave in names of weights: torch.compile's anywhere, DDP's before all.
COMPILED, PARALLEL = "_orig_mod.", "module."
# Entries of a checkpoint that hold tensors under names, but no weights.
NO_WEIGHTS = re.compile(r"optim|sched|scaler|callback|loop|grad", re.IGNORECASE)
MOST_NAMES = 8  # that an error lists of each kind
# What stands in a file of weights that was not downloaded as one.
IMPOSTORS = (
    (
        b"version https://git-lfs",
        "a pointer of Git LFS and not the file itself; run `git lfs pull`",
    ),
    (b"<!doctype", "a web page; download the file itself"),
    (b"<html", "a web page; download the file itself"),
)


def read_json_file(folder: str | Path, name: str) -> dict:
    """A JSON object of a model folder. Raises FileNotFoundError or ValueError naming the file."""
    file = Path(folder) / name
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: not found; a model is a folder that has it, or a hub name"
        )
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error}); copy or download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a JSON object; copy or download it again")
    return content


@contextmanager
def blaming(file: Path | str) -> Iterator[None]:
    """For a block in which another library makes something of ``file``, which is a JSON object with
    any content: whatever it raises becomes a ValueError that names the file."""
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{file}: cannot be used ({type(error).__name__}: {reason}); mend it or take another"
        ) from None


def read_all(source: str | Path) -> dict[str, Tensor]:
    """Every weight of a model folder, or of the shards that an index file names, on the CPU, mapped
    from disk where the format allows.

    Raises FileNotFoundError where no known file or one of its shards is there, ValueError for one
    that is broken.
    """
    file = Path(source) if Path(source).is_file() else weight_file(source)
    weights: dict[str, Tensor] = {}
    for part in shards(file) if file.suffix == ".json" else [file]:
        if not part.is_file():
            raise FileNotFoundError(
                f"{file}: names the shard {part.name}, which is missing; copy or download it again"
            )
        weights.update(read_file(part))
    return weights


def weight_names(folder: str | Path) -> set[str] | None:
    """The names of a folder's weights, read off their index or header; None for a format that must
    be loaded to know them."""
    file = weight_file(folder)
    if file.suffix == ".json":
        return set(_plain_names(_weight_map(file)))
    if file.suffix != ".safetensors":
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            return set(_plain_names(opened.keys()))
    except SafetensorError as error:
        raise _broken(file, error) from None


def weight_file(folder: str | Path) -> Path:
    """The file that holds a folder's weights, or else the index of their shards."""
    for name in SINGLE:
        for file in (Path(folder) / name, Path(folder) / f"{name}.index.json"):
            if file.is_file():
                return file
    raise FileNotFoundError(
        f"{folder}: no weights here; looked for {', '.join(SINGLE)} and their shards (.index.json)"
    )


def shards(index: Path) -> list[Path]:
    """The files that an index names, which belong beside it."""
    return [index.parent / name for name in sorted(set(_weight_map(index).values()))]


def _weight_map(index: Path) -> dict[str, str]:
    """Weight -> file, as an index says. Raises ValueError for a file outside of its folder."""
    try:
        names = {
            str(key): str(v) for key, v in json.loads(index.read_bytes())["weight_map"].items()
        }
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError(f'{index}: not an index of shards; it needs a "weight_map"') from None
    for name in names.values():
        if Path(name).name != name:
            raise ValueError(f"{index}: shard {name!r} is not a plain file name")
    return names


def read_file(file: Path) -> dict[str, Tensor]:
    """Names and tensors of one .safetensors or torch file, without what training wrapped around
    them: {"model": …}, DDP's "module.", torch.compile's "_orig_mod.".

    Raises FileNotFoundError or ValueError naming it, also for a weight that is not finite.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file with weights")
    try:
        if file.suffix == ".safetensors":
            content = load_file(file)
        else:
            # Training scripts store their arguments beside the weights; a Namespace runs nothing.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(
                    file, map_location="cpu", weights_only=True, mmap=_is_zip(file)
                )
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        UnpicklingError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
        OverflowError,
    ) as error:
        raise _broken(file, error) from None
    weights = _unwrapped(content, file)
    refuse_non_finite(weights, file)
    return weights


def _unwrapped(content: Any, file: Path) -> dict[str, Tensor]:
    """The one table of weights in what a file holds, under the names that its model gave them."""
    tables = dict(_tables(content))
    if not tables:
        raise ValueError(f"{file}: holds no table of weights by name; save a state_dict() alone")
    if len(tables) > 1:
        raise ValueError(
            f"{file}: holds several tables of weights, {', '.join(map(repr, sorted(tables)))}; save"
            " the one to use alone"
        )
    (weights,) = tables.values()
    names = _plain_names(weights)
    if len(set(names)) < len(names):
        raise ValueError(f"{file}: holds weights twice, with and without {COMPILED!r} in the name")
    return dict(zip(names, weights.values(), strict=True))


def _plain_names(wrapped: Iterable[str]) -> list[str]:
    """Names of weights without what DDP and torch.compile put into all of them."""
    names = [name.replace(COMPILED, "") for name in wrapped]
    while names and all(name.startswith(PARALLEL) for name in names):
        names = [name.removeprefix(PARALLEL) for name in names]
    return names


def _tables(content: Any, place: str = "", depth: int = 3) -> Iterator[tuple[str, dict]]:
    """(its place, the table) of every table of weights in nested dictionaries; the file itself may
    be an empty one."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        return
    is_table = all(isinstance(value, Tensor) for value in content.values())
    if is_table and (not place or any("." in name for name in content)):
        yield place, content
    elif depth:
        for key, value in content.items():
            if not NO_WEIGHTS.search(key):
                yield from _tables(value, f"{place}.{key}".lstrip("."), depth - 1)


def refuse_non_finite(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Raises ValueError naming ``source`` and every weight with a NaN or an infinity.

    It reads each weight once, from where it is mapped. That brings into the page cache what the
    model is about to need from there, so nothing is read from the disk a second time.
    """
    bad = [name for name, weight in weights.items() if not is_finite(weight)]
    if bad:
        raise ValueError(
            f"{source}: not finite: {_few(bad)} (NaN or infinity); the file is damaged, or its"
            " training has diverged: take another one"
        )


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or an infinity."""
    if not values.is_floating_point() or values.is_meta or not values.numel():
        return True
    if values.element_size() == 1:  # torch cannot compare numbers of 8 bits.
        values = values.float()
    # NaN is smaller and larger than anything to it, and no second tensor is made: 16 GB in a
    # second on one core, where ``isfinite`` does 0.4.
    return all(bool(end.isfinite()) for end in values.aminmax())


class NonFiniteAnswer(ValueError):
    """What a model computed is no number, so that a word or mask chosen by it would mean
    nothing."""


def require_finite(values: Tensor, what: str) -> None:
    """Raises NonFiniteAnswer for ``what`` a model has computed with a NaN or an infinity in it."""
    if not is_finite(values):
        raise NonFiniteAnswer(
            f"{what} are not finite (NaN or infinity), although the weights are: the numbers do"
            " not fit into --precision (take bf16 or fp32 instead of fp16), or the model has"
            " diverged"
        )


def _few(names: Iterable[str]) -> str:
    """The first of some names, and how many there are more."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _broken(file: Path, error: Exception) -> ValueError:
    with file.open("rb") as stream:
        start = stream.read(64).lstrip().lower()
    for sign, words in IMPOSTORS:
        if start.startswith(sign):
            return ValueError(f"{file}: not a file of weights but {words}")
    if isinstance(error, UnpicklingError):
        # What torch says about a pickle with more than weights is advice to load it unsafely.
        found = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        what = f"it holds a {found[1]}, save its state_dict() alone" if found else "damaged"
        return ValueError(
            f"{file}: not a file of weights (damaged, or more than weights: {what}); copy or"
            " download it again"
        )
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return ValueError(f"{file}: not a file of weights ({reason}); copy or download it again")


def _is_zip(file: Path) -> bool:
    """Whether torch.save wrote it in the format that can be mapped; older files cannot."""
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def refuse_mismatch(
    expected: Mapping[str, torch.Size | tuple], found: Mapping[str, Tensor], source: str | Path
) -> None:
    """Raises ValueError naming every weight of ``expected`` (name -> shape) that is missing,
    unexpected or wrongly shaped in ``found``."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "wrong shape": sorted(
            f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name])}"
            for name in expected.keys() & found.keys()
            if tuple(found[name].shape) != tuple(expected[name])
        ),
    }
    raise_problems(problems, source)


def raise_problems(problems: Mapping[str, Iterable[str]], source: str | Path) -> None:
    """Raises ValueError where any of the lists of names has one."""
    listed = {kind: list(names) for kind, names in problems.items()}
    lines = [f"{kind}: {_few(names)}" for kind, names in listed.items() if names]
    if lines:
        raise ValueError(f"{source}: the weights do not fit the model; " + "; ".join(lines))


def load_strict(module: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Loads all of ``weights`` into all of ``module``; raises ValueError naming what does not
    fit."""
    expected = {name: value.shape for name, value in module.state_dict().items()}
    refuse_mismatch(expected, weights, source)
    module.load_state_dict(weights)


def refuse_bad_loading(source: str | Path, info: Mapping[str, Any]) -> None:
    """Raises ValueError naming every missing, unexpected or wrongly shaped weight that transformers
    reports."""
    kinds = {
        "missing_keys": "missing",
        "unexpected_keys": "unexpected",
        "mismatched_keys": "wrong shape",
    }
    problems = {}
    for key, label in kinds.items():
        problems[label] = sorted(
            str(item[0] if isinstance(item, tuple) else item) for item in info.get(key, ())
        )
    raise_problems(problems, source)

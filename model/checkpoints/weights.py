"""Weights of a folder, by name, from every layout that transformers writes: one file or shards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError  # Raised by torch.load(weights_only=True).
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

SINGLE = ("model.safetensors", "pytorch_model.bin")
"""The file of weights that is not cut into shards, in the order in which transformers looks."""


def read_json_file(folder: str | Path, name: str) -> dict:
    """A JSON object of a model folder. Raises FileNotFoundError or ValueError naming the file."""
    file = Path(folder) / name
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; --version takes a model folder or a hub name")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a JSON object")
    return content


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
        return set(_weight_map(file))
    if file.suffix != ".safetensors":
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
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
        names = {str(key): str(v) for key, v in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f'{index}: not an index of shards; it needs a "weight_map"') from None
    for name in names.values():
        if Path(name).name != name:
            raise ValueError(f"{index}: shard {name!r} is not a plain file name")
    return names


def read_file(file: Path) -> dict[str, Tensor]:
    """Names and tensors of one .safetensors or torch file. Raises FileNotFoundError or ValueError
    naming it."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file with weights")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        UnpicklingError,
        ValueError,
        KeyError,
    ) as error:
        raise _broken(file, error) from None
    if not isinstance(content, dict) or not all(
        isinstance(value, Tensor) for value in content.values()
    ):
        raise ValueError(f"{file}: holds no table of weights by name")
    return content


def _broken(file: Path, error: Exception) -> ValueError:
    # What torch says about a pickle with more than weights is advice to load it unsafely.
    reason = (
        "damaged, or more than weights"
        if isinstance(error, UnpicklingError)
        else next(iter(str(error).splitlines()), "") or type(error).__name__
    )
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
    lines = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
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

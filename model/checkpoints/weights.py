"""Weights of a folder or a hub name, by name, from every layout that transformers writes: one file
or shards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError  # torch.load(weights_only=True) raises it

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import cached_file

SINGLE = ("model.safetensors", "pytorch_model.bin")


def find_file(source: str | Path, name: str) -> Path | None:
    """``name`` in a local folder, or in a hub repository (downloaded or cached); None where it is
    not there.

    Raises FileNotFoundError for a folder that does not exist and for a hub that cannot be asked. A
    repository that is cached in part is taken to hold no more than that while the hub cannot be
    asked: one may work offline.
    """
    if looks_like_path(str(source)) and not Path(source).is_dir():
        raise FileNotFoundError(
            f"{source}: no such folder; --version takes a model folder or a hub name such as"
            " owner/name"
        )
    try:
        found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{source}: {' '.join(str(error).split())}") from None
    if found is None and not Path(source).is_dir() and _is_unknown(str(source), name):
        raise FileNotFoundError(
            f"{source}: the hub cannot be reached, and its cache has nothing of this model; check"
            " the network and HF_HUB_OFFLINE, or give the path of a folder"
        )
    return Path(found) if found else None


def _is_unknown(repository: str, name: str) -> bool:
    """Whether the cache knows neither any model of ``repository`` nor that it lacks ``name``: then
    the hub did not answer."""
    return try_to_load_from_cache(repository, name) is None and not isinstance(
        try_to_load_from_cache(repository, "config.json"), str
    )


def looks_like_path(source: str) -> bool:
    """Whether ``source`` is no hub name, which is "owner/name"."""
    return Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") != 1


def read_json_file(source: str | Path, name: str) -> dict:
    """A JSON object of a model folder or hub name. Raises FileNotFoundError or ValueError naming
    the file."""
    file = find_file(source, name)
    if file is None:
        raise FileNotFoundError(
            f"{Path(source) / name}: not found; --version takes a model folder or a hub name"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a JSON object")
    return content


def read_all(source: str | Path) -> dict[str, Tensor]:
    """Every weight of a model folder or hub name, on the CPU, mapped from disk where the format
    allows.

    Raises FileNotFoundError where no known file or one of its shards is there, ValueError for one
    that is broken.
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(source):
        weights.update(read_file(file))
    return weights


def weight_files(source: str | Path) -> list[Path]:
    """The files that hold the weights. ``source``: a folder, a hub name, or an index file
    itself."""
    if Path(source).is_file():
        return _shards(Path(source), Path(source).parent)
    for name in SINGLE:  # in transformers' order, which reads what this names
        file = find_file(source, name)
        if file is not None:
            return [file]
        index = find_file(source, f"{name}.index.json")
        if index is not None:
            return _shards(index, source)
    raise FileNotFoundError(
        f"{source}: no weights here; looked for {', '.join(SINGLE)} and their shards (.index.json)"
    )


def _shards(index: Path, source: str | Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f'{index}: not an index of shards; it needs a "weight_map"') from None
    files = []
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index}: shard {name!r} is not a plain file name")
        file = find_file(source, name)
        if file is None:
            raise FileNotFoundError(
                f"{index}: names the shard {name}, which is missing; copy or download it again"
            )
        files.append(file)
    return files


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
        # torch's own advice here is to load the file unsafely
        unsafe = isinstance(error, UnpicklingError)
        reason = (
            "damaged, or more than weights"
            if unsafe
            else next(iter(str(error).splitlines()), "") or type(error).__name__
        )
        raise ValueError(
            f"{file}: not a file of weights ({reason}); copy or download it again"
        ) from None
    if not isinstance(content, dict) or not all(
        isinstance(value, Tensor) for value in content.values()
    ):
        raise ValueError(f"{file}: holds no table of weights by name")
    return content


def _is_zip(file: Path) -> bool:
    """Whether torch.save wrote it in the format that can be mapped; older files cannot."""
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def compare(
    own: Mapping[str, torch.Size | tuple], found: Mapping[str, Tensor], source: str | Path
) -> None:
    """Raises ValueError naming every weight of ``own`` (name -> shape) that is missing, unexpected
    or wrongly shaped."""
    problems = {
        "missing": sorted(own.keys() - found.keys()),
        "unexpected": sorted(found.keys() - own.keys()),
        "wrong shape": sorted(
            f"{name} {tuple(found[name].shape)} instead of {tuple(own[name])}"
            for name in own.keys() & found.keys()
            if tuple(found[name].shape) != tuple(own[name])
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
    compare({name: value.shape for name, value in module.state_dict().items()}, weights, source)
    module.load_state_dict(weights)


def refuse_bad_loading(source: str | Path, info: dict) -> None:
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

"""DeepSpeed's files, read without running anything that they may hold.

A ``*_states.pt`` is a pickle, and DeepSpeed itself unpickles whatever it says. Here ``read_states``
is the only way in: it makes tensors, plain values and the few classes that DeepSpeed puts into its
files, and refuses the rest. ``restricted`` makes DeepSpeed's own loading go the same way, so that
what is checked is what is loaded.

ZeRO-1 and -2 lay the trained weights of a parameter group end to end, in float32, and give each
rank a part of them. ZeRO-3 gives each rank a part of every weight. ``trained_weights`` puts them
together.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cores.utils.settings.flags import UsageError

# torch obeys it even where a caller such as DeepSpeed asks for the opposite.
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_RANK = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_(?:model|optim)_states\.pt")
OPTIMIZER = "optimizer_state_dict"


@contextlib.contextmanager
def _safe_load() -> Iterator[None]:
    """Every ``torch.load`` makes nothing but tensors, plain values and DeepSpeed's own classes."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(
            [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
        ):
            yield
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before


@contextlib.contextmanager
def restricted(engine) -> Iterator[None]:
    """While it is entered, DeepSpeed's ``engine`` reads files with ``read_states`` only."""

    def read(path: str, map_location: Any = None) -> dict[str, Any]:
        return read_states(Path(path), map_location, mmap=False)

    reader = engine.checkpoint_engine
    with _safe_load():
        reader.load = read  # Of this object; its class keeps its own.
        try:
            yield
        finally:
            del reader.load


def read_states(file: Path, map_location: Any = "cpu", mmap: bool = True) -> dict[str, Any]:
    """The table in a file that torch.save wrote. ``mmap``: tensors are read when they are used, if
    the format allows. Raises UsageError naming the file."""
    try:
        with file.open("rb") as stream:
            mapped = mmap and stream.read(4) == b"PK\x03\x04"
        with _safe_load():
            content = torch.load(file, map_location=map_location, mmap=mapped, weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{file}: missing") from None
    except MemoryError:
        raise
    except Exception as error:  # Of a hostile or damaged pickle any class may come.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = (
            f"it names {named[1]}, which is no part of a checkpoint and may run code"
            if named
            else "damaged, or more than weights and numbers"
        )
        raise UsageError(f"{file}: cannot be read ({reason}); nothing of it was used") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file}: holds no table of states; copy it again")
    return content


def state_folder(folder: Path) -> Path | None:
    """The folder with DeepSpeed's files: ``state`` in a checkpoint of ours, the one that ``latest``
    names in another's, or ``folder`` itself; None if none has any."""
    names, latest = ["state"], folder / "latest"
    if latest.is_file():
        with latest.open(encoding="utf-8", errors="replace") as stream:
            names.append(stream.read(256).strip())
    beside = [name for name in names if name.isprintable() and Path(name).name == name]
    for state in (*(folder / name for name in beside), folder):
        if any(state.glob("*_states.pt")):
            return state
    return None


def trained_weights(state: Path) -> dict[str, Tensor]:
    """Names and values of the trained weights, float32, and of the buffers, from DeepSpeed's files
    in ``state``: any ZeRO stage, any number of ranks. Raises UsageError naming what is missing or
    broken."""
    try:
        if not any(state.glob("*_optim_states.pt")):  # Without ZeRO there are no shards.
            return dict(read_states(state / "mp_rank_00_model_states.pt")["module"])
        shards = [read_states(file)[OPTIMIZER] for file in optimizer_files(state)]
        counts = shards[0]["partition_count"]
        count = max(counts) if isinstance(counts, list) else counts
        if count != len(shards):
            raise UsageError(
                f"{state}: incomplete checkpoint: saved by {count} ranks, but the optimizer's state"
                f" is in {len(shards)} files"
            )
        whole = int(shards[0]["zero_stage"]) < 3
        name = ("" if whole else "zero_pp_rank_0_") + "mp_rank_00_model_states.pt"
        if not (state / name).is_file():
            raise UsageError(f"{state}: incomplete checkpoint: {name} is missing")
        model = read_states(state / name)
        buffers = {n: v for n, v in model["module"].items() if n in model["buffer_names"]}
        weights = {n: v.float() if v.is_floating_point() else v for n, v in buffers.items()}
        weights |= _joined(shards, model["param_shapes"]) if whole else _zipped(shards, model)
        for alias, original in dict(model.get("shared_params") or {}).items():
            if original in weights:
                weights[alias] = weights[original]
        return weights
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise UsageError(
            f"{state}: not a checkpoint of DeepSpeed that this program understands"
            f" ({type(error).__name__}: {error}); copy it again, or give what zero_to_fp32.py wrote"
        ) from None


def optimizer_files(state: Path) -> list[Path]:
    """The files with the parts of the optimizer's state, in the order of ranks. Raises UsageError
    for a rank that is missing and for a file of another kind."""
    files: dict[int, Path] = {}
    for file in state.glob("*_optim_states.pt"):
        found = _RANK.fullmatch(file.name)
        if found is None:
            raise UsageError(
                f"{file}: is no file of ZeRO's for one model on every rank (zero_pp_rank_R_mp_rank_"
                "00_optim_states.pt); models in several parts cannot be read"
            )
        if int(found[1]) in files:
            raise UsageError(f"{file}: rank {found[1]} has a second file; remove the wrong one")
        files[int(found[1])] = file
    absent = set(range(len(files))) - files.keys()
    if absent:
        raise UsageError(f"{state}: incomplete checkpoint: rank {min(absent)} has no optim_states")
    return [files[rank] for rank in sorted(files)]


def _joined(shards: list[dict], shapes: list[dict]) -> dict[str, Tensor]:
    """ZeRO-1, -2: parameter groups, each cut into one part per rank."""
    weights: dict[str, Tensor] = {}
    paddings = shards[0].get("param_alignment_paddings") or [None] * len(shapes)
    for i, (group, gaps) in enumerate(zip(shapes, paddings, strict=True)):
        flat = torch.cat([shard["single_partition_of_fp32_groups"][i] for shard in shards])
        offset = 0
        for (name, shape), gap in zip(group.items(), gaps or [0] * len(group), strict=True):
            weights[name] = flat[offset : offset + math.prod(shape)].view(tuple(shape))
            offset += math.prod(shape) + gap
        # DeepSpeed pads a group to a multiple of twice the number of ranks.
        if not 0 <= len(flat) - offset < 2 * len(shards):
            raise IndexError(f"group {i} has {len(flat)} numbers for {offset}")
    return weights


def _zipped(shards: list[dict], model: dict) -> dict[str, Tensor]:
    """ZeRO-3: every weight is cut into one part per rank, the last ones padded."""
    flat = [torch.cat(list(shard["fp32_flat_groups"])) for shard in shards]
    weights: dict[str, Tensor] = {}
    offset = 0
    for group in model["param_shapes"]:
        for name, shape in group.items():
            part = math.ceil(math.prod(shape) / len(shards))
            whole = torch.cat([numbers[offset : offset + part] for numbers in flat])
            weights[name] = whole[: math.prod(shape)].view(tuple(shape))
            offset += part
    if any(len(numbers) != offset for numbers in flat):
        raise IndexError(f"{[len(numbers) for numbers in flat]} numbers for {offset}")
    return weights

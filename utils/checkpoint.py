"""Run folders and checkpoints.

::

    runs/NAME/config.json     the settings, read back by every later tool
              ckpt/last, ckpt/best   each a DeepSpeed checkpoint (ZeRO shards of any world size) with progress.json
              log.jsonl  tensorboard/  metrics.json  examples.png

A checkpoint is written beside its place and renamed when it is complete: a killed run leaves the previous one intact.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from utils import distributed
from utils.arguments import Settings, UsageError, settings_of

PROGRESS = "progress.json"


def write_text(path: Path, text: str) -> None:
    """Atomic and durable: the file holds either the old or the new text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def save_settings(run: Path, settings: Settings) -> None:
    write_text(run / "config.json", json.dumps(settings.saved(), indent=1) + "\n")


def load_settings(run: Path) -> Settings:
    """The settings of a run folder. Raises UsageError if it is none."""
    file = run / "config.json"
    if not file.is_file():
        raise UsageError(f"{file}: not found; give a run folder that train_ds.py wrote")
    return settings_of(json.loads(file.read_text()))


def find_checkpoint(path: str | Path, which: str = "last") -> Path:
    """The checkpoint that a run folder, its ckpt folder or a checkpoint folder stands for, or a UsageError."""
    path = Path(path)
    for folder in (path, path / "ckpt" / which, path / which):
        recover(folder)
        if (folder / PROGRESS).is_file():
            return folder
    raise UsageError(f"{path}: no checkpoint here; looked for {PROGRESS} in it, in ckpt/{which} and in {which}")


def recover(folder: Path) -> None:
    """Finishes a replacement that was interrupted between its two renames."""
    old = folder.with_name(folder.name + ".old")
    if old.is_dir() and not folder.exists():
        old.rename(folder)


def _replace(folder: Path, partial: Path) -> None:
    """Puts the complete ``partial`` in the place of ``folder``; ``recover`` mends an interruption between the two renames."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save(engine, folder: Path, progress: dict[str, Any]) -> None:
    """Writes engine state and ``progress`` to ``folder``, all or nothing. Every rank calls it."""
    partial = folder.with_name(folder.name + ".partial")
    if distributed.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    engine.save_checkpoint(str(partial), tag="state", client_state={"progress": progress}, exclude_frozen_parameters=True)
    torch.save(_random_state(), partial / f"random_{distributed.rank()}.pt")
    distributed.barrier()
    if distributed.is_main():
        _sync(partial)
        write_text(partial / PROGRESS, json.dumps(progress, indent=1) + "\n")
        _replace(folder, partial)
    distributed.barrier()


def copy(source: Path, target: Path) -> None:
    """``target`` becomes a copy of the checkpoint ``source``, all or nothing. The main rank does it."""
    if distributed.is_main():
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        _replace(target, partial)
    distributed.barrier()


def load(engine, folder: Path) -> dict[str, Any]:
    """Restores engine and random state; returns the progress. The world size must be that of the save."""
    progress = json.loads((folder / PROGRESS).read_text())
    if progress["world_size"] != distributed.world_size():
        raise UsageError(
            f"{folder}: saved by {progress['world_size']} ranks, this run has {distributed.world_size()}; "
            "resume with the same number"
        )
    loaded, _ = engine.load_checkpoint(str(folder), tag="state", load_module_strict=False)
    if loaded is None:
        raise UsageError(f"{folder}: DeepSpeed found no state in it")
    _restore_random_state(torch.load(folder / f"random_{distributed.rank()}.pt", weights_only=True))
    return progress


def load_weights(model: nn.Module, folder: Path) -> None:
    """The trained weights of a checkpoint (any ZeRO stage, any world size) or file, into a model built as for training.

    Raises UsageError naming trainable weights that are missing, and weights that the model does not train.
    """
    put_weights(model, read_weights(folder), folder)


def put_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: Path) -> None:
    """Exactly ``weights`` into exactly the trainable weights of ``model``. ``source``: for the UsageError's message."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    constants = {name for name, _ in model.named_buffers()}  # DeepSpeed stores them, too
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys() - constants)
    wrong = sorted(n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape)
    if missing or unexpected or wrong:
        lists = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong}
        found = "; ".join(f"{what}: {', '.join(names)}" for what, names in lists.items() if names)
        raise UsageError(f"{source}: the weights do not fit the model that the settings describe; {found}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Names and values, on the CPU, of a checkpoint folder or of a file that zero_to_fp32.py or safetensors wrote."""
    path = Path(path)
    if path.is_dir():
        return _read_shards(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file or folder with weights")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of foreign bytes the unpickler makes anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UsageError(f"{path}: not a file of weights ({reason})") from None


def _read_shards(folder: Path) -> dict[str, torch.Tensor]:
    state = folder / "state"
    if not any(state.glob("*_optim_states.pt")):  # ZeRO stage 0 writes no shards
        return torch.load(state / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it narrates
            return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="state", exclude_frozen_parameters=True)
    except (ValueError, FileNotFoundError) as error:  # a shard is missing
        raise UsageError(f"{folder}: incomplete checkpoint: {error}") from None


def _random_state() -> dict[str, Any]:
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

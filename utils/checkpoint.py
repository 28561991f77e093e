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
from torch import nn

from model.lora import our_name
from model.weights import SINGLE, read_all, read_file
from utils import distributed
from utils.arguments import Settings, UsageError, settings_of

PROGRESS = "progress.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


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


def find_weights(path: str | Path, which: str) -> Path:
    """As ``find_checkpoint``, but also a file, an index or a folder of consolidated weights that lies in a run folder."""
    try:
        return find_checkpoint(path, which)
    except UsageError:
        if Path(path).is_file() or any(Path(path).glob("*.index.json")) or any((Path(path) / name).is_file() for name in SINGLE):
            return Path(path)
        raise


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
    """``weights`` into ``model``: all trainable ones must be there, frozen ones may be, nothing else.

    Names may be ours or those of a published LISA in training. ``source``: for the UsageError's message.
    """
    own = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()}
    trainable = {name for name, p in own.items() if p.requires_grad}
    constants = {name for name, _ in model.named_buffers()}  # DeepSpeed stores them, too
    linear = any(name.endswith("mm_projector.weight") for name in weights)
    weights = {our_name(name, linear): weight for name, weight in weights.items()}
    weights.pop(None, None)
    missing, unexpected = sorted(trainable - weights.keys()), sorted(weights.keys() - own.keys() - constants)
    wrong = sorted(n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape)
    broken = sorted(n for n in own.keys() & weights.keys() if not weights[n].to(own[n].dtype).isfinite().all())
    if missing or unexpected or wrong or broken:
        lists = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong, "not finite": broken}
        found = "; ".join(f"{what}: {', '.join(names)}" for what, names in lists.items() if names)
        raise UsageError(f"{source}: the weights do not fit the model that the settings describe; {found}")
    with torch.no_grad():
        for name, parameter in own.items():
            if name in weights:
                parameter.copy_(weights[name])


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run folder or one of its checkpoints, whose settings are known."""
    around = (path, *list(path.resolve().parents)[:2])
    return any((folder / "config.json").is_file() and (folder / "ckpt").is_dir() for folder in around)


def is_adapter(path: Path) -> bool:
    """Whether ``path`` is a folder that PEFT wrote."""
    return (path / ADAPTER_CONFIG).is_file()


def refuse_other_adapters(config: dict[str, Any], path: Path) -> None:
    """Raises UsageError for an adapter_config.json that says more than W + (α/r)·B·A in layers that it lists by name."""
    if config.get("peft_type", "LORA") != "LORA":
        raise UsageError(f"{path}: peft_type is {config['peft_type']!r}; only LORA can be merged")
    for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save"):
        if config.get(name):
            raise UsageError(
                f"{path}: {name} is {config[name]!r}, which this program has no place for; merge the adapter with PEFT"
            )
    if config.get("bias", "none") != "none":
        raise UsageError(f"{path}: bias is {config['bias']!r}; adapters with trained biases cannot be merged here")
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int):
            raise UsageError(f"{path}: {ADAPTER_CONFIG} says {name} {config.get(name)!r}; it must be a whole number")
    if not isinstance(config.get("target_modules"), list):
        raise UsageError(f"{path}: target_modules is {config.get('target_modules')!r}; a list of names of layers is needed")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Names and values, on the CPU, of whatever holds weights: a checkpoint folder of ours or of DeepSpeed, a folder or an
    index of shards, a PEFT adapter, or one file. Raises UsageError naming what is missing or broken.
    """
    path = Path(path)
    try:
        if is_adapter(path):
            return read_file(next(path / name for name in ADAPTER_FILES if (path / name).is_file()))
        if path.is_dir() and _deepspeed_state(path) is not None:
            return _read_shards(path)
        if path.is_dir() or path.name.endswith(".index.json"):
            return read_all(path)
        return read_file(path)
    except StopIteration:
        raise UsageError(f"{path}: an adapter without weights; looked for {', '.join(ADAPTER_FILES)}") from None
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from None


def _deepspeed_state(folder: Path) -> Path | None:
    """The folder with DeepSpeed's own files: below a checkpoint of ours, below the tag in ``latest``, or itself."""
    latest = folder / "latest"
    names = ["state", latest.read_text().strip()] if latest.is_file() else ["state"]
    for state in (*(folder / name for name in names if name and Path(name).name == name), folder):
        if any(state.glob("*_states.pt")):
            return state
    return None


def _read_shards(folder: Path) -> dict[str, torch.Tensor]:
    state = _deepspeed_state(folder)
    if not any(state.glob("*_optim_states.pt")):  # ZeRO stage 0 writes no shards
        file = state / "mp_rank_00_model_states.pt"
        return torch.load(file, map_location="cpu", weights_only=True)["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it narrates
            return get_fp32_state_dict_from_zero_checkpoint(str(state.parent), tag=state.name, exclude_frozen_parameters=True)
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

"""Run folders and checkpoints.

::

    runs/NAME/config.json     the settings, read back by every later tool
              ckpt/last       the state to continue from
              ckpt/best       the state with the highest validation gIoU
                state/        a DeepSpeed checkpoint (ZeRO shards of any number of ranks)
                random_R.pt   random state of rank R
                files.json    size of every file, in bytes
                progress.json how far the training was
                settings.json, identity.json
                              copies of config.json, and what the run was made of (identity.py)
              identity.json  lock  log.jsonl  trackers.json  tensorboard/
              metrics.json   examples.png

A checkpoint is written beside its place and renamed when it is complete: a killed run leaves the
previous one intact. One that a disk damaged later is refused, whoever reads it. Only the training
that holds the lock (lock.py) writes; readers take what is there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cores.dataset.files.sealed import write_sealed
from cores.dataset.files.write import DISK_FULL, disk_error, sync, write_text
from cores.model.checkpoints.weights import SINGLE, read_all, read_file
from cores.model.reasoning.lora import our_name
from cores.utils import distributed
from cores.utils.settings.arguments import Settings
from cores.utils.settings.flags import UsageError
from cores.utils.training import reshard, shards
from cores.utils.training.verify import FILES, PROGRESS, faults, read_progress

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def save_settings(run: Path, settings: Settings) -> None:
    write_text(run / "config.json", json.dumps(settings.saved(), indent=1) + "\n")


def find_checkpoint(path: str | Path, which: str = "last") -> Path:
    """The checkpoint that a run folder, its ckpt folder or a checkpoint folder stands for, or a
    UsageError."""
    path = Path(path)
    for folder in (path, path / "ckpt" / which, path / which):
        # The second stands for the first while a training replaces it, or was killed doing so.
        for there in (folder, _old(folder)):
            if (there / PROGRESS).is_file():
                return there
    raise UsageError(
        f"{path}: no checkpoint here; looked for {PROGRESS} in it, in ckpt/{which} and in {which}"
    )


def find_weights(path: str | Path, which: str) -> Path:
    """As ``find_checkpoint``, but also a file, an index or a folder of consolidated weights that
    lies in a run folder."""
    try:
        return find_checkpoint(path, which)
    except UsageError:
        if (
            Path(path).is_file()
            or any(Path(path).glob("*.index.json"))
            or any((Path(path) / name).is_file() for name in SINGLE)
        ):
            return Path(path)
        raise


def _old(folder: Path) -> Path:
    """Where a checkpoint is between the two renames of a replacement."""
    return folder.with_name(folder.name + ".old")


def recover(folder: Path) -> None:
    """Undoes a replacement (see ``_replace``) that was interrupted between its two renames. Only
    the main rank of the training that holds the run's lock calls it."""
    if _old(folder).is_dir() and not folder.exists():
        _old(folder).rename(folder)


def recover_all(run: Path) -> None:
    """``recover`` for the checkpoints of a run. Every rank of its training calls it."""
    if distributed.is_main():
        for name in ("last", "best"):
            recover(run / "ckpt" / name)
    distributed.barrier()


def _replace(folder: Path, partial: Path) -> None:
    """Puts the complete ``partial`` in the place of ``folder``; ``recover`` mends an interruption
    between the two renames."""
    recover(folder)  # Otherwise the next lines would remove an ``.old`` that is the only one left.
    shutil.rmtree(_old(folder), ignore_errors=True)
    if folder.exists():
        folder.rename(_old(folder))
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(_old(folder), ignore_errors=True)


def save(engine, folder: Path, progress: dict[str, Any], notes: dict[str, dict[str, Any]]) -> None:
    """Writes the engine's state, the random states and ``progress`` to ``folder``, all or nothing.
    Every rank calls it. ``notes``: further JSON objects, by the names of their files.

    Raises OSError, one line, where the files cannot be written; ``folder`` is then what it was.
    """
    partial = folder.with_name(folder.name + ".partial")
    with _one_line(partial):
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        distributed.barrier()
        engine.save_checkpoint(str(partial), tag="state", exclude_frozen_parameters=True)
        torch.save(_random_state(), partial / f"random_{distributed.rank()}.pt")
        distributed.barrier()
        if distributed.is_main():
            for name, content in notes.items():
                write_sealed(partial / name, content)
            files = (path for path in sorted(partial.rglob("*")) if path.is_file())
            sizes = {str(path.relative_to(partial)): path.stat().st_size for path in files}
            write_sealed(partial / FILES, sizes)
            write_sealed(partial / PROGRESS, progress)
            _sync_all(partial)
            _replace(folder, partial)
        distributed.barrier()


def write_progress(folder: Path, progress: dict[str, Any]) -> None:
    """Replaces the progress of the checkpoint ``folder``: its state did not change, but more is
    known about it. Every rank calls it."""
    if distributed.is_main():
        saved = read_progress(folder) or {}
        # This stays, as the state may come from another number of ranks.
        progress = progress | {k: v for k, v in saved.items() if k == "world_size"}
        write_sealed(folder / PROGRESS, progress)
    distributed.barrier()


def copy(source: Path, target: Path) -> None:
    """Makes ``target`` a copy of the checkpoint ``source``, all or nothing. Every rank calls it."""
    if distributed.is_main():
        partial = target.with_name(target.name + ".partial")
        with _one_line(partial):
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            _sync_all(partial)
            _replace(target, partial)
    distributed.barrier()


@contextlib.contextmanager
def _one_line(partial: Path) -> Iterator[None]:
    """Turns errors of writing the folder ``partial`` into an OSError, one line, and removes what
    was written of it, so that the disk is no fuller than before.

    The main rank removes it, as the others write there, too; whatever fails for them because of
    that is a ProcessLost that names the first fault."""
    done = False
    try:
        yield
        done = True
    except (OSError, RuntimeError) as error:
        distributed.refuse_after_others(error)
        found = disk_error(error)
        if found is None:
            raise
        reason = found.strerror or " ".join(str(found).split())
        full = found.errno in DISK_FULL
        there = next(folder for folder in partial.parents if folder.is_dir())
        if full:
            reason += f"; {shutil.disk_usage(there).free / 10**9:.2f} GB are free there"
        mend = "free space" if full else "see what else changes this folder"
        failed = OSError(
            f"{partial}: the checkpoint cannot be written ({reason}); {mend}, and the same command"
            " continues from the last complete one"
        )
        distributed.tell(failed)
        raise failed from error
    finally:
        if not done and distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)


def refuse_damaged(folder: Path, run: Path) -> None:
    """Raises UsageError naming a damaged file of a checkpoint and the flag that goes on without it,
    or a file that holds more than a state. Every rank calls it."""
    lost = [] if read_progress(folder) else [f"{folder / PROGRESS}: missing or damaged"]
    found = list(dict.fromkeys(lost + faults(folder)))
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise UsageError(f"{found[0]}{more}; {_way_on(folder, run)}")
    for file in sorted(folder.rglob("*.pt")):
        shards.read_states(file)


def _way_on(bad: Path, run: Path) -> str:
    """The flag that goes on although the checkpoint ``bad`` cannot be used."""
    restart = "--no-auto_resume trains from the start"
    for name in ("last", "last.old", "best", "best.old"):
        other = run / "ckpt" / name
        progress = read_progress(other) if other.is_dir() and other != bad else None
        if progress and not faults(other):
            return (
                f"{name} is whole: the same command with --resume {other} continues from epoch"
                f" {progress['epoch']}, {restart}"
            )
    return f"there is no other checkpoint in {run / 'ckpt'}: {restart}"


def refuse_damaged_best(run: Path) -> None:
    """Raises UsageError if the ``best`` of a run is damaged, which the run would need at its end.
    Every rank calls it."""
    best = run / "ckpt" / "best"
    found = faults(best) if best.is_dir() else []
    if found:
        raise UsageError(
            f"{found[0]}; remove {best}: the run goes on from last, and takes the best of the"
            " validations to come"
        )


def refuse_lost(run: Path) -> None:
    """Raises UsageError if a run has checkpoints but no usable ``last``: starting over would
    destroy what is left."""
    last = run / "ckpt" / "last"
    if last.is_dir():
        refuse_damaged(last, run)
    elif any((run / "ckpt" / name / PROGRESS).is_file() for name in ("best", "best.old")):
        raise UsageError(f"{last}: missing; {_way_on(last, run)}")


def load(engine, folder: Path) -> dict[str, Any]:
    """Restores engine and random state; returns the progress, with the number of ranks that saved
    it as "world_size".

    Call ``refuse_damaged`` and ``reshard.refuse`` before, even before a model is loaded: they tell
    whether the files are whole and these ranks may go on.
    """
    progress = read_progress(folder)
    if progress is None:
        raise UsageError(f"{folder / PROGRESS}: missing or damaged")
    saved = progress["world_size"]
    if saved == distributed.world_size():
        with shards.restricted(engine):
            found, _ = engine.load_checkpoint(str(folder), tag="state", load_module_strict=False)
    else:
        found = reshard.load(engine, folder, saved)
    if found is None:
        raise UsageError(f"{folder}: DeepSpeed found no state in it")
    state = reshard.random_state(folder, saved, distributed.rank())
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    return progress


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copies the trained weights of a checkpoint (any ZeRO stage, any number of ranks) or file into
    a model built as for training; UsageError as ``put_weights``."""
    put_weights(model, read_weights(folder), folder)


def put_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: Path) -> None:
    """Copies ``weights`` into ``model``. All trainable ones must be there, frozen ones may be.

    Names may be ours or those of a published LISA in training. Raises UsageError naming ``source``
    and the weights that are missing, unknown to the model, of another shape or not finite.
    """
    own = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()}
    trainable = {name for name, p in own.items() if p.requires_grad}
    buffers = {name for name, _ in model.named_buffers()}  # DeepSpeed stores them, too.
    linear = any(name.endswith("mm_projector.weight") for name in weights)
    named = {our_name(name, linear): weight for name, weight in weights.items()}
    weights = {name: weight for name, weight in named.items() if name is not None}
    both = own.keys() & weights.keys()
    faults = {
        "missing": trainable - weights.keys(),
        "unexpected": weights.keys() - own.keys() - buffers,
        "wrong shape": {n for n in both if own[n].shape != weights[n].shape},
        "not finite": {n for n in both if not weights[n].to(own[n].dtype).isfinite().all()},
    }
    found = "; ".join(f"{what}: {', '.join(sorted(n))}" for what, n in faults.items() if n)
    if found:
        raise UsageError(
            f"{source}: the weights do not fit the model that the settings describe; {found}"
        )
    with torch.no_grad():
        for name in both:
            own[name].copy_(weights[name])


def is_adapter(path: Path) -> bool:
    """Whether ``path`` is a folder that PEFT wrote."""
    return (path / ADAPTER_CONFIG).is_file()


# Fields of an adapter_config.json that are read, or say nothing about the weights.
ADAPTER_FIELDS = {"r", "lora_alpha", "use_dora", "use_rslora", "target_modules", "bias"} | {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}
# Other ways to begin change the frozen weights, too.
BEGINNINGS = (True, False, "gaussian", "eva")


def refuse_other_adapters(config: dict[str, Any], path: Path) -> None:
    """Raises UsageError for an adapter_config.json whose adapter is more than LoRA or DoRA with one
    rank and one scale."""
    if config.get("peft_type", "LORA") != "LORA":
        raise UsageError(f"{path}: peft_type is {config['peft_type']!r}; only LORA can be merged")
    if config.get("bias", "none") != "none":
        raise UsageError(
            f"{path}: bias is {config['bias']!r}; adapters with trained biases cannot be merged"
            " here"
        )
    for name, kind, words in (
        ("r", int, "a whole number"),
        ("lora_alpha", int, "a whole number"),
        ("use_dora", bool, "true or false"),
        ("use_rslora", bool, "true or false"),
    ):
        value = config.get(name, False if kind is bool else None)
        if type(value) is not kind:
            raise UsageError(f"{path}: {ADAPTER_CONFIG} says {name} {value!r}; it must be {words}")
    if not isinstance(config.get("target_modules"), (str, list)):
        raise UsageError(
            f"{path}: target_modules is {config.get('target_modules')!r}; a list of names of layers"
            " or a pattern is needed"
        )
    from peft import LoraConfig  # This takes seconds, and few need it.

    plain = vars(LoraConfig()) | {"init_lora_weights": True}
    for name, value in config.items():
        same = value in BEGINNINGS if name == "init_lora_weights" else value == plain.get(name)
        if name not in ADAPTER_FIELDS and not same and value not in (None, False, [], {}):
            raise UsageError(
                f"{path}: {name} is {value!r}, which this program has no place for; merge the"
                " adapter with PEFT"
            )


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Names and values, on the CPU, of whatever holds weights: a checkpoint folder of ours or of
    DeepSpeed, a folder or an index of shards, a PEFT adapter, or one file.

    Every rank calls it. Raises UsageError naming what is missing, damaged or more than weights.
    """
    path = Path(path)
    try:
        if is_adapter(path):
            return read_file(next(path / name for name in ADAPTER_FILES if (path / name).is_file()))
        if path.is_dir() and shards.state_folder(path) is not None:
            return _read_state(path)
        if path.is_dir() or path.name.endswith(".index.json"):
            return read_all(path)
        return read_file(path)
    except StopIteration:
        raise UsageError(
            f"{path}: an adapter without weights; looked for {', '.join(ADAPTER_FILES)}"
        ) from None
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from None


def _read_state(folder: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a checkpoint folder with DeepSpeed's files, which are whole. A
    training that replaces the folder meanwhile makes one process begin again."""
    for _ in range(5):
        before = _version(folder)
        found, weights = [f"{folder}: gone"], {}
        try:
            state = shards.state_folder(folder)
            if before and state:
                # Beside the state that another program's ``latest`` names may be many more.
                found = faults(folder if (folder / FILES).is_file() else state)
            if not found and state:
                weights = shards.trained_weights(state)
        except (OSError, UsageError) as error:
            found = [str(error)]
        if before == _version(folder) and before:
            break
        if distributed.world_size() > 1:  # Ranks that did different things would wait forever.
            found = [f"{folder}: was replaced by a training while it was read; try again"]
            break
        folder = folder.with_name(folder.name.removesuffix(".old"))
        time.sleep(0.5)
    if found:
        raise UsageError(found[0] + (f" and {len(found) - 1} more" if len(found) > 1 else ""))
    return weights


def _version(folder: Path) -> tuple[int, int] | None:
    """Differs between a checkpoint folder and the one that replaces it; None if it is not there."""
    for path in (folder / FILES, folder):
        with contextlib.suppress(OSError):
            return path.stat().st_ino, path.stat().st_mtime_ns
    return None


def _random_state() -> dict[str, Any]:
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _sync_all(folder: Path) -> None:
    """Syncs files before the folders that name them, so that no name is ever without its file."""
    for path in sorted(folder.rglob("*"), key=Path.is_dir):
        sync(path)
    sync(folder)

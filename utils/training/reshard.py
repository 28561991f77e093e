"""A checkpoint of any number of ranks continues on any other number (ZeRO stages 0, 1 and 2).

ZeRO-1 and -2 lay the trained weights of a parameter group end to end, in float32, pad the end with
zeros and give each rank an equal part of them and of AdamW's moments. For other ranks the parts are
joined, the padding dropped, and the result cut anew; each rank reads no more than it needs. Without
ZeRO every rank has everything, and DeepSpeed's own loading serves.

Example, where _ is padding: 3 ranks have 5 weights as (0 1) (2 3) (4 _), and 2 ranks get them as
(0 1 2) (3 4 _).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from cores.utils import distributed
from cores.utils.settings.arguments import Settings
from cores.utils.settings.flags import UsageError
from cores.utils.training import shards

# The parts of a random state, and what stands for one that need not be there.
RANDOM: dict[str, Any] = {"torch": None, "cuda": torch.empty(0)}


def refuse(folder: Path, progress: dict[str, Any], s: Settings, earlier: Settings) -> None:
    """Raises UsageError if this number of ranks cannot continue the checkpoint ``folder`` of a run
    with the settings ``earlier``.

    ``progress``: that of the checkpoint. A step must have as many images as before; otherwise every
    later step would have other samples than if the run had never stopped.
    """
    saved, now = progress["world_size"], distributed.world_size()
    epoch, step = progress.get("epoch", s.start_epoch), progress.get("step", 0)
    if not (s.start_epoch <= epoch <= s.epochs and step <= (epoch < s.epochs) * s.steps_per_epoch):
        raise UsageError(
            f"{folder}: progress.json says epoch {epoch}, step {step}, which --epochs {s.epochs} of"
            f" --steps_per_epoch {s.steps_per_epoch} do not have; use another checkpoint, or"
            " --no-auto_resume to start over"
        )
    if saved != now and s.zero_stage == 3:
        raise UsageError(
            f"{folder}: saved by {saved} ranks, this run has {now}; --zero_stage 3 continues with"
            " the same number only; use that, or merge and start from there, see docs/recipes.md,"
            " 'Another number of ranks'"
        )
    before = (
        progress.get("images_per_step")
        or earlier.batch_size * earlier.grad_accumulation_steps * saved
    )
    images = s.batch_size * s.grad_accumulation_steps * now
    if before != images:
        raise UsageError(
            f"{folder}: a step had {before} images and would now have {images} ({now} ranks ×"
            f" --batch_size {s.batch_size} × --grad_accumulation_steps"
            f" {s.grad_accumulation_steps}); add --global_batch_size {before}"
        )


def load(engine, folder: Path, saved: int) -> str | None:
    """Restores the engine from ``folder``, which another number of ranks, ``saved``, wrote. Returns
    what DeepSpeed read, None if there was nothing.

    Raises UsageError if the optimizer's state is not that of ``saved`` ranks and of the engine's
    weights.
    """
    parts = engine.zero_optimization()
    with shards.restricted(engine):
        loaded, _ = engine.load_checkpoint(
            str(folder), tag="state", load_module_strict=False, load_optimizer_states=not parts
        )
    if loaded is not None and parts:
        state = _state_of_this_rank(engine.optimizer, _read_parts(folder, saved), folder)
        engine.optimizer.load_state_dict(
            # It takes the entry of its rank.
            state_dict_list=[state] * distributed.world_size(),
            load_from_fp32_weights=engine.zero_load_from_fp32_weights(),
        )
    return loaded


def partition(parts: list[torch.Tensor], total: int, size: int, rank: int) -> torch.Tensor:
    """One rank's part of the flat ``parts`` laid end to end: the ``size`` numbers from
    ``rank * size`` on, where those after the first ``total`` are padding, zeros."""
    start, end = rank * size, min((rank + 1) * size, total)
    pieces, offset = [], 0
    for part in parts:
        pieces.append(part[max(0, start - offset) : max(0, end - offset)])
        offset += len(part)
    flat = torch.cat(pieces)
    return torch.cat([flat, flat.new_zeros(size - len(flat))])


def random_state(folder: Path, saved: int, rank: int) -> dict[str, Any]:
    """The random state with which ``rank`` continues a checkpoint that ``saved`` ranks wrote, in
    the form in which ``checkpoint.save`` stores it.

    A rank that was there goes on with its own state; a new one starts from a hash of a saved state
    and of its number.
    """
    file = folder / f"random_{rank % saved}.pt"
    state = shards.read_states(file, mmap=False)
    if not all(isinstance(state.get(k, fine), torch.Tensor) for k, fine in RANDOM.items()):
        raise UsageError(f"{file}: holds no random state; copy it again")
    if rank < saved:
        return state
    digest = hashlib.sha256(state["torch"].numpy().tobytes() + str(rank).encode()).digest()
    seed = int.from_bytes(digest[:8], "little", signed=True)
    fresh = {"torch": torch.Generator().manual_seed(seed).get_state()}
    if torch.cuda.is_available():
        fresh["cuda"] = torch.Generator(distributed.device()).manual_seed(seed).get_state()
    return fresh


def _read_parts(folder: Path, saved: int) -> list[dict[str, Any]]:
    """What ZeRO saved of the optimizer, by rank. Files are mapped into memory, so that only tensors
    that are used are read."""
    files = shards.optimizer_files(folder / "state")
    if len(files) != saved:
        raise UsageError(
            f"{folder}: saved by {saved} ranks, but the optimizer's state is not in {saved} files"
        )
    return [shards.read_states(file)[shards.OPTIMIZER] for file in files]


def _state_of_this_rank(optimizer, saved: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What this rank would have saved if it had been there."""
    base = saved[0]["base_optimizer_state"]
    weights, moments = [], dict(base["state"])
    for i, group in enumerate(base["param_groups"]):
        name = group["params"][0]  # ZeRO has one flat tensor per group.
        total = sum(p.numel() for p in optimizer.bit16_groups[i])
        size = optimizer.single_partition_of_fp32_groups[i].numel()  # With this engine's padding.
        # ZeRO saves weights without padding, but moments with it.
        parts = [shard["single_partition_of_fp32_groups"][i] for shard in saved]
        if sum(map(len, parts)) != total:
            raise UsageError(
                f"{folder}: {sum(map(len, parts))} trained numbers, but the model has {total}; give"
                " the run's settings"
            )
        weights.append(partition(parts, total, size, distributed.rank()))
        moments[name] = dict(base["state"][name])
        for key, value in moments[name].items():
            if value.dim():  # The number of steps has no dimension and stays.
                parts = [shard["base_optimizer_state"]["state"][name][key] for shard in saved]
                moments[name][key] = partition(parts, total, size, distributed.rank())
    return saved[0] | {
        "single_partition_of_fp32_groups": weights,
        "base_optimizer_state": base | {"state": moments},
    }

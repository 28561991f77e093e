"""A checkpoint of any number of ranks continues on any other number (ZeRO stages 0, 1 and 2).

ZeRO-1 and -2 lay the trained weights of a parameter group end to end, in float32, pad the end with
zeros and give each rank an equal part of them and of AdamW's moments. For other ranks the parts are
joined, the padding dropped, and the result cut anew; each rank reads no more than it needs. Without
ZeRO every rank has everything, and DeepSpeed's own loading serves.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from utils import distributed
from utils.settings.arguments import Settings
from utils.settings.flags import UsageError


def refuse(folder: Path, progress: dict[str, Any], s: Settings, earlier: Settings) -> None:
    """Raises UsageError if the ranks of now cannot continue the checkpoint ``folder`` of a run with
    the settings ``earlier``.

    ``progress``: what the checkpoint says about itself. The images of a step must stay as many, or
    every later step would have other samples than in the run as it began.
    """
    saved, now = progress["world_size"], distributed.world_size()
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


def load(engine, folder: Path, saved: int) -> bool:
    """Restores the engine from ``folder``, which ``saved`` other ranks wrote. False if there is
    nothing in it.

    Raises UsageError if the optimizer's state is not that of ``saved`` ranks and of the engine's
    weights.
    """
    parts = engine.zero_optimization()
    loaded, _ = engine.load_checkpoint(
        str(folder), tag="state", load_module_strict=False, load_optimizer_states=not parts
    )
    if loaded is not None and parts:
        state = _own_state(engine.optimizer, _read_parts(folder, saved), folder)
        engine.optimizer.load_state_dict(
            # of which it takes that of its rank
            state_dict_list=[state] * distributed.world_size(),
            load_from_fp32_weights=engine.zero_load_from_fp32_weights(),
        )
    return loaded is not None


def partition(parts: list[torch.Tensor], total: int, size: int, rank: int) -> torch.Tensor:
    """The ``size`` numbers from ``rank * size`` on of the flat ``parts`` laid end to end; zeros
    after the first ``total``."""
    start, end = rank * size, min((rank + 1) * size, total)
    pieces, offset = [], 0
    for part in parts:
        pieces.append(part[max(0, start - offset) : max(0, end - offset)])
        offset += len(part)
    flat = torch.cat(pieces)
    return torch.cat([flat, flat.new_zeros(size - len(flat))])


def random_state(folder: Path, saved: int, rank: int) -> dict[str, Any]:
    """The random state with which ``rank`` goes on after ``saved`` ranks wrote ``folder``: as
    ``checkpoint.save`` stores it.

    A rank that was there goes on with its own. One that was not starts from a hash of a saved one
    and of its number.
    """
    state = torch.load(folder / f"random_{rank % saved}.pt", weights_only=True)
    if rank < saved:
        return state
    digest = hashlib.sha256(state["torch"].numpy().tobytes() + str(rank).encode()).digest()
    seed = int.from_bytes(digest[:8], "little", signed=True)
    fresh = {"torch": torch.Generator().manual_seed(seed).get_state()}
    if torch.cuda.is_available():
        fresh["cuda"] = torch.Generator(distributed.device()).manual_seed(seed).get_state()
    return fresh


def _read_parts(folder: Path, saved: int) -> list[dict[str, Any]]:
    """What ZeRO saved of the optimizer, by rank. Its tensors lie in mapped files: what is not used
    is not read."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    files = [
        list((folder / "state").glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
        for rank in range(saved)
    ]
    if not all(len(found) == 1 for found in files):
        raise UsageError(
            f"{folder}: saved by {saved} ranks, but the optimizer's state is not in {saved} files"
        )
    with torch.serialization.safe_globals(
        [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    ):
        shards = [
            torch.load(found[0], map_location="cpu", mmap=True, weights_only=True)
            for found in files
        ]
    return [shard["optimizer_state_dict"] for shard in shards]


def _own_state(optimizer, saved: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What this rank would have saved. Its size is the engine's, whose padding depends on the
    number of ranks."""
    state = dict(saved[0])
    base = state["base_optimizer_state"]
    weights, moments = [], dict(base["state"])
    for i, group in enumerate(base["param_groups"]):
        name = group["params"][0]  # one flat tensor stands for the group
        total, size = (
            sum(p.numel() for p in optimizer.bit16_groups[i]),
            optimizer.single_partition_of_fp32_groups[i].numel(),
        )
        # without padding, the moments are with it
        parts = [other["single_partition_of_fp32_groups"][i] for other in saved]
        if sum(map(len, parts)) != total:
            raise UsageError(
                f"{folder}: {sum(map(len, parts))} trained numbers, but the model has {total}; give"
                " the run's settings"
            )
        weights.append(partition(parts, total, size, distributed.rank()))
        moments[name] = {
            key: (
                partition(
                    [other["base_optimizer_state"]["state"][name][key] for other in saved],
                    total,
                    size,
                    distributed.rank(),
                )
                if value.dim()
                else value
            )  # the number of steps
            for key, value in base["state"][name].items()
        }
    return state | {
        "single_partition_of_fp32_groups": weights,
        "base_optimizer_state": base | {"state": moments},
    }

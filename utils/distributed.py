"""Ranks: start-up on CPU or GPU with any launcher, and the few collectives that the rest needs.

Outside a process group, every function behaves as in a world of one rank.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist


def device() -> torch.device:
    """This rank's device; everything else follows it."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def prepare_environment() -> None:
    """Makes plain ``python`` a world of one, and tells DeepSpeed if there is no GPU. Call it before
    deepspeed is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # DeepSpeed calls deprecated functions; every rank would warn of them in every run.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if "RANK" not in os.environ:
        # DeepSpeed wants an address to be there. Nothing listens on this one, see ``start``.
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"
        )


def start() -> None:
    """Joins the process group, once. A world of one meets nobody: it uses no port, which another
    program might have taken."""
    prepare_environment()
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if os.environ["WORLD_SIZE"] == "1":
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend)


def stop() -> None:
    """Leaves the process group; all ranks do so together, at the end."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather_lists(items: list) -> list:
    """The concatenation of every rank's list, in rank order, on every rank."""
    if world_size() == 1:
        return items
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def total(values: list[int]) -> list[int]:
    """Sum over ranks of every entry; all ranks have lists of the same length."""
    if world_size() == 1:
        return values
    table = torch.tensor(values, dtype=torch.int64, device=device())
    dist.all_reduce(table)
    return table.tolist()


def mean(values: dict[str, float]) -> dict[str, float]:
    """Mean over ranks of every entry; all ranks have the same keys."""
    if world_size() == 1:
        return values
    table = torch.tensor(list(values.values()), dtype=torch.float64, device=device())
    dist.all_reduce(table)
    return dict(zip(values, (table / world_size()).tolist(), strict=True))


def any_true(flag: bool) -> bool:
    """Whether any rank says True: all ranks must leave a loop together."""
    if world_size() == 1:
        return flag
    table = torch.tensor([float(flag)], device=device())
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return bool(table.item())

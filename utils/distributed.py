"""Ranks: start-up on CPU or GPU with any launcher, and the few collectives that the rest needs.

Outside a process group, every function behaves as in a world of one rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from cores.dataset import command
from cores.dataset.command import one_line
from cores.utils.lifeline import LastWords, Lifeline

VARIABLES = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
# How long ranks wait for each other at the start, in seconds: on one machine a launcher starts them
# together; other machines may take minutes to read the program from a shared disk.
WAIT_VARIABLE, WAIT_HERE, WAIT_ELSEWHERE = "CORES_START_TIMEOUT", 20, 300
# Words of errors that torch.distributed raises when another rank has died.
RANK_GONE = (
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "gloo",
    "NCCL",
    "Timed out waiting",
    "Socket Timeout",
)
_lifeline: Lifeline | None = None


class ProcessLost(RuntimeError):
    """A data worker or another rank is gone."""

    exit_code = command.PROCESS_LOST


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
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        # DeepSpeed wants an address to be there. Nothing listens on this one, see ``start``.
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"
        )


class RankPlace(NamedTuple):
    """Where this process stands among the ranks, as launchers say it."""

    rank: int
    world: int
    local: int
    address: str
    port: int


def place() -> RankPlace:
    """This process's place. Raises ValueError naming the variable that is missing or wrong."""
    prepare_environment()
    needed = ["RANK", "WORLD_SIZE"]
    if os.environ.get("WORLD_SIZE") != "1":
        needed += ["MASTER_ADDR", "MASTER_PORT"]
    absent = [name for name in needed if not os.environ.get(name)]
    if absent:
        there = ", ".join(name for name in VARIABLES if name in os.environ)
        raise ValueError(
            f"{', '.join(absent)} not set, but {there}: a launcher (torchrun, deepspeed) sets all"
            f" of {', '.join(VARIABLES)}; unset them to run in one process"
        )
    found = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        text = os.environ.get(name) or {"LOCAL_RANK": "0", "MASTER_PORT": "29500"}[name]
        if not text.isdecimal():
            raise ValueError(f"{name} is {text!r} in the environment; it must be a whole number")
        found[name] = int(text)
    rank, world, local, port = found.values()
    if not rank < world:
        raise ValueError(f"RANK is {rank}, but WORLD_SIZE {world}: ranks count from 0")
    if not 0 < port < 65536:
        raise ValueError(f"MASTER_PORT is {port}; ports are 1 to 65535")
    return RankPlace(rank, world, local, os.environ.get("MASTER_ADDR") or "127.0.0.1", port)


def start() -> None:
    """Joins the process group, once. A world of one meets nobody: it uses no port, which another
    program might have taken.

    Several ranks meet first: when this returns, all are there, and each ends when another does. In
    a wrong environment raises ValueError; ProcessLost if they cannot meet.
    """
    global _lifeline
    here = place()
    if dist.is_initialized():
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and here.local >= gpus:
        raise ValueError(f"LOCAL_RANK is {here.local}, but this machine has {gpus} GPUs")
    if gpus:
        torch.cuda.set_device(device())
    backend = "nccl" if gpus else "gloo"
    if here.world == 1:
        # DeepSpeed reads these, too.
        os.environ.update(LOCAL_RANK=str(here.local), MASTER_ADDR=here.address)
        os.environ["MASTER_PORT"] = str(here.port)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    store, _lifeline = _meet(here)
    try:
        dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.world)
    except BaseException as error:
        raise _leaving(error) from error


def _meet(here: RankPlace) -> tuple[dist.Store, Lifeline]:
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(here.address, here.port)}
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"MASTER_ADDR {here.address!r} cannot be resolved ({error}); give the name or address"
            " of the machine of rank 0 (--master_addr)"
        ) from None
    local = all(one == "::1" or one.startswith("127.") for one in addresses)
    default = WAIT_HERE if local else WAIT_ELSEWHERE
    text = os.environ.get(WAIT_VARIABLE) or str(default)
    try:
        seconds = float(text)
        limit = timedelta(seconds=max(1.0, seconds))
    except (ValueError, OverflowError):
        raise ValueError(f"{WAIT_VARIABLE} is {text!r}; give a number of seconds") from None
    lifeline = Lifeline(here.rank, here.world)
    key = f"cores/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/lifeline"
    try:
        # torchrun listens at this port itself, with a store that says where rank 0 is.
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        agents = _open_store(here.address, here.port, limit) if served else None
        if here.rank == 0:
            server = _listen(here.address, 0 if agents else here.port, local)
            token = secrets.token_hex() if agents else ""
            if agents:
                agents.set(key, json.dumps([server.getsockname()[1], token]))
            own = _listen(here.address, 0, local)
            port = own.getsockname()[1]
            lifeline.gather(server, token, seconds, port)
            store = _open_store(here.address, port, limit, own)
        else:
            port, token = json.loads(agents.get(key)) if agents else (here.port, "")
            port = lifeline.join(here.address, port, token, seconds)
            store = _open_store(here.address, port, limit)
    except (dist.DistError, RuntimeError, OSError) as error:
        what = one_line(error).split(" Exception raised from")[0]
        lifeline.tell(command.PROCESS_LOST, what)
        raise ProcessLost(
            f"rank {here.rank} of {here.world}: {what}; the ranks meet at --master_addr,"
            f" --master_port (here {here.address}:{here.port}) and wait {WAIT_VARIABLE} seconds for"
            " each other"
        ) from None
    store.set_timeout(timedelta(minutes=30))
    lifeline.watch()
    return store, lifeline


def _listen(address: str, port: int, local: bool) -> socket.socket:
    """A socket on which rank 0 is met. Raises ValueError, with a free port, if it is taken."""
    dual = not local and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ":" in address else socket.AF_INET
    host = address if local else ""
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        with socket.create_server(("", 0)) as free:
            other = free.getsockname()[1]
        raise ValueError(
            f"port {port} of {address} cannot be used ({os.strerror(error.errno or 0)}), perhaps"
            f" another program has it; choose a free one: deepspeed or torchrun --master_port"
            f" {other}, or MASTER_PORT={other} for all ranks"
        ) from None


def _open_store(
    address: str, port: int, limit: timedelta, own: socket.socket | None = None
) -> dist.TCPStore:
    """``own``: the socket of the rank that serves it."""
    return dist.TCPStore(
        address,
        port,
        is_master=own is not None,
        timeout=limit,
        wait_for_workers=False,
        master_listen_fd=None if own is None else own.detach(),
    )


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """The ranks do something together: if one of them fails here, all end, and know why.

    Raises what this rank raised, or ProcessLost or Stopped for what happened to another.
    """
    start()
    try:
        yield
    except BaseException as error:
        told = _leaving(error)
        if told is error:
            raise
        raise told from error
    if _lifeline is not None:
        _lifeline.leave()


def _leaving(error: BaseException) -> BaseException:
    """What to raise in place of ``error``, which ends this rank; the others are told."""
    if _lifeline is None:
        return error
    if isinstance(error, SystemExit) and not error.code:
        _lifeline.leave()
        return error
    if lost_rank(error):
        words = last_words()
        if words is not None and words.code_for_others == command.STOPPED:
            return command.Terminated()
        error = ProcessLost(f"{words or one_line(error)}; this rank ends with it")
    tell(error)
    return error


def tell(error: BaseException) -> None:
    """Tells the other ranks what this one ends with, before it is cleared up."""
    if _lifeline is not None:
        end = command.explain(error)
        _lifeline.tell(end.code, end.line)


def refuse_after_others(error: BaseException) -> None:
    """Raises ProcessLost if another rank failed before this one's ``error``, which may come of
    that."""
    words = last_words(1.0)
    if words is not None and not isinstance(error, ProcessLost):
        raise ProcessLost(f"{words}; this rank ends with it") from error


def lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    if world_size() == 1 or isinstance(error, ProcessLost):
        return False
    if not isinstance(error, (RuntimeError, ConnectionError)):
        return False
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in RANK_GONE)


def last_words(seconds: float = 3.0) -> LastWords | None:
    """Of another rank that has ended, if it comes to be known within so many seconds."""
    return None if _lifeline is None else _lifeline.lost(seconds)


def _leave(code: int) -> NoReturn:
    """All ranks end in order together; one that fails waits for nobody."""
    if code == 0:
        stop()
    elif world_size() > 1:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


command.leave_by(_leave)


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

"""Starts the programs again and again without importing them again, and kills them at chosen
points.

    trial = server().start("cores.train_ds", argv, die_at=17)
    trial.wait()                                            # -9

The server is a process of its own with one thread: it imports torch, DeepSpeed and the programs
once, which takes ten seconds of a processor, then forks for every trial, which takes none. Every
process of pytest-xdist has one server, started with the first trial. A trial of a training counts
its *events*, the places where a kill could leave something half done: steps, rows of the log, files
written, synced, renamed, removed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ForkServer:
    """The side of the tests."""

    def __init__(self, folder: Path):
        """``folder``: for the output of trials."""
        env = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
        env |= {
            name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        }
        env["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as command.guard has it for programs
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            cwd=ROOT,
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.read() == "ready"
        self._trials = 0

    def read(self) -> Any:
        line = self._process.stdout.readline()
        assert line, "the fork server died"
        return json.loads(line)

    def start(self, program: str, argv: list[str], **job: Any) -> Trial:
        """Runs ``program``.main(argv) of any module ``program`` that has a ``main``. ``code``: the
        text of a program to run instead of ``main``. ``die_at``: the event at which it is killed,
        counted from 0; ``faults``: names of FAULTS with their arguments; ``env``: variables;
        ``ranks``: how many processes. One trial at a time."""
        self._trials += 1
        output = self.folder / f"trial-{self._trials}.txt"
        job |= {"program": program, "argv": [str(part) for part in argv], "output": str(output)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Trial(self, self.read(), output)

    def run(self, program: str, argv: list[str], **job: Any) -> Trial:
        trial = self.start(program, argv, **job)
        trial.wait()
        return trial


@cache
def server() -> ForkServer:
    """The one of this test session; it ends when the session closes the pipe to it."""
    return ForkServer(Path(_KEPT.name))


_KEPT = tempfile.TemporaryDirectory(prefix="cores-trials-")


class Trial:
    """One start of a program: ``pids``, and after ``wait`` the exit ``codes``, negative after a
    signal."""

    def __init__(self, server: ForkServer, pids: list[int], output: Path):
        self.pids, self.codes, self._server, self._output = pids, [], server, output

    def kill(self, number: int = signal.SIGKILL, rank: int = 0) -> None:
        """Must come before ``wait``: until then the server leaves the process a zombie, and its pid
        is no other's."""
        os.kill(self.pids[rank], number)

    def wait(self, seconds: float = 300) -> int:
        """The exit code of the first rank. What runs for longer is killed."""
        self._server._process.stdin.write("\n")
        self._server._process.stdin.flush()
        if not select.select([self._server._process.stdout], [], [], seconds)[0]:
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)
        self.codes = self._server.read()
        return self.codes[0]

    @property
    def killed(self) -> bool:
        return self.codes[0] == -signal.SIGKILL

    @property
    def output(self) -> str:
        return "".join(
            p.read_text(errors="replace")
            for p in sorted(self._output.parent.glob(f"{self._output.name}*"))
        )

    @property
    def events(self) -> list[str]:
        return json.loads(self._output.with_suffix(".events").read_text())


# ------------------------------------------------------------------------------------------- events


class Events:
    """Counts events of this process and kills it at one of them."""

    def __init__(self, die_at: int | None, counted: Path):
        self.die_at, self.counted, self.seen, self.pid = die_at, counted, [], os.getpid()

    def __call__(self, name: str, half: Callable[[], object] | None = None) -> None:
        """``half``: leaves what the event would leave if it was cut off in the middle."""
        if os.getpid() != self.pid:  # a data worker
            return
        if len(self.seen) == self.die_at:
            if half:
                half()
            os.kill(self.pid, signal.SIGKILL)
        self.seen.append(name)

    def before(self, owner: Any, name: str) -> None:
        """Every call of ``owner.name`` is an event, before it happens."""
        real = getattr(owner, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            self(name)
            return real(*args, **kwargs)

        setattr(owner, name, function)

    def write(self) -> None:
        self.counted.write_text(json.dumps(self.seen))


def cut_in_half(path: Any) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def watch(events: Events) -> None:
    import shutil

    import torch

    from cores.utils.training.log import RunLog
    from cores.utils.training.trainer import Trainer

    for owner, name in (
        (os, "fsync"),
        (os, "rename"),
        (os, "replace"),
        (os, "unlink"),
        (os, "rmdir"),
        (os, "mkdir"),
    ):
        events.before(owner, name)
    save, copyfile, step, write = torch.save, shutil.copyfile, Trainer._step, RunLog.write

    def torch_save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        events("save")
        save(value, path, *args, **kwargs)
        events("half save", lambda: cut_in_half(path))

    def copy(source: Any, target: Any, **kwargs: Any) -> Any:
        events("copy")
        done = copyfile(source, target, **kwargs)
        events("half copy", lambda: cut_in_half(target))
        return done

    def one_step(trainer: Trainer, batches: Any) -> Any:
        events("step")
        parts = step(trainer, batches)
        events("step done")
        return parts

    def row(log: RunLog, *args: Any) -> None:
        events("row")
        write(log, *args)
        events("half row", lambda: os.truncate(log.path, log.path.stat().st_size - 20))

    torch.save, shutil.copyfile, Trainer._step, RunLog.write = torch_save, copy, one_step, row


# ------------------------------------------------------------------------------------------- faults


def full_disk(after: int) -> None:
    """Every file of this process ends at ``after`` bytes."""
    import resource

    # then the write fails as on a full disk, with EFBIG
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, after))


def full_disk_at_save(number: int) -> None:
    """As ``full_disk``, from the checkpoint ``number`` on, counted from 0."""
    from cores.utils.training import checkpoint

    real, left = checkpoint.save, iter(range(number))

    def save(*args: Any) -> None:
        if next(left, None) is None:
            full_disk(10_000)
        real(*args)

    checkpoint.save = save


def stop_in(what: str) -> None:
    """SIGTERM in the middle of "validation", of a "save", or two of them in a save ("twice")."""
    from cores import train_ds
    from cores.utils.training import checkpoint

    def ask(*_: Any) -> None:
        for _ in range(1 + (what == "twice")):
            os.kill(os.getpid(), signal.SIGTERM)

    def wrapped(real: Callable) -> Callable:
        def function(*args: Any, **kwargs: Any) -> Any:
            ask()
            return real(*args, **kwargs)

        return function

    if what == "validation":
        train_ds.evaluate = wrapped(train_ds.evaluate)
    else:
        checkpoint._random_state = wrapped(checkpoint._random_state)


def stop_at_step(number: int, rank: int) -> None:
    if os.environ["RANK"] == str(rank):
        _at_step(number, lambda _: os.kill(os.getpid(), signal.SIGTERM))


def die_at_step(number: int, rank: int) -> None:
    if os.environ["RANK"] == str(rank):
        _at_step(number, lambda _: os.kill(os.getpid(), signal.SIGKILL))


def nan_gradient(number: int) -> None:
    """The loss stays what it is, a weight's gradient does not."""

    def spoil(trainer: Any) -> None:
        weight = trainer.engine.module.text_projection[0].weight
        weight.register_hook(lambda gradient: gradient * float("nan"))

    _at_step(number, spoil)


def worker_killed(number: int) -> None:
    def kill(trainer: Any) -> None:
        worker = trainer.loader._iterator._workers[0]
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()

    _at_step(number, kill)


def images_lost(number: int, folder: str) -> None:
    def remove(_: Any) -> None:
        for image in Path(folder).rglob("*.jpg"):
            image.write_bytes(b"lost")

    _at_step(number, remove)


def _at_step(number: int, action: Callable) -> None:
    """``action(trainer)`` before step ``number``, counted from 1."""
    from cores.utils.training.trainer import Trainer

    real = Trainer._step

    def step(trainer: Trainer, batches: Any) -> Any:
        if trainer.global_step + 1 == number:
            action(trainer)
        return real(trainer, batches)

    Trainer._step = step


FAULTS = {
    f.__name__: f
    for f in (
        full_disk,
        full_disk_at_save,
        stop_in,
        stop_at_step,
        die_at_step,
        nan_gradient,
        worker_killed,
        images_lost,
    )
}


# --------------------------------------------------------------------------------------- the server


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # imports print

    import deepspeed  # noqa: F401

    from cores import train_ds  # noqa: F401  (what the other programs import beside it takes no time)

    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1, (
        "a fork would lose threads"
    )
    print(json.dumps("ready"), file=answers)
    while line := sys.stdin.readline():
        job = json.loads(line)
        ranks = job.get("ranks", 1)
        port = free_port()
        pids = [fork(job, rank, ranks, port) for rank in range(ranks)]
        print(json.dumps(pids), file=answers)
        sys.stdin.readline()  # until then a pid stays that of the trial
        print(
            json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]),
            file=answers,
        )


def fork(job: dict[str, Any], rank: int, ranks: int, port: int) -> int:
    if pid := os.fork():
        return pid
    code = 70
    try:
        output = os.open(f"{job['output']}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        world = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update(
            {name: str(value) for name, value in (world | job.get("env", {})).items()}
        )
        for name, arguments in job.get("faults", {}).items():
            FAULTS[name](*arguments)
        events = Events(job.get("die_at"), Path(job["output"]).with_suffix(".events"))
        watch(events)
        code = run(job)
        events.write()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: dict[str, Any]) -> int:
    import importlib

    if "code" in job:
        exec(job["code"], {"__name__": "__main__"})
        return 0
    return importlib.import_module(job["program"]).main(job["argv"])


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    serve()

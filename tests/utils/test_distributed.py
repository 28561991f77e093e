"""One rank alone fails: all end within seconds, in one line with its cause."""

import time

import pytest

from cores.utils.training import checkpoint
from tests.chaos_toys import command, run_of
from tests.fork_server import Trial, server

PROGRAM = """
import os, signal, time
from cores import train_ds
from cores.dataset.files.errors import DataError
from tests.fork_server import full_disk_at_save
from cores.utils import build
from cores.utils.training.trainer import Trainer
rank, argv = int(os.environ["RANK"]), {argv!r}

def on(failing, owner, name, action):
    "Calls ``action`` before ``owner.name`` on the rank that fails."
    real = getattr(owner, name)
    def function(*args, **kwargs):
        if rank == failing:
            action(*args)
        return real(*args, **kwargs)
    setattr(owner, name, function)

def fail(error):
    def action(*_):
        raise error
    return action

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

{fault}
raise SystemExit(train_ds.main(argv))
"""
MEMORY = 'RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")'
# The other rank computes for long, and waits for nobody.
LAST = """
on({dies}, train_ds, 'final_evaluation', die)
on(1 - {dies}, train_ds, 'final_evaluation', lambda *_: time.sleep(100))
"""
# Which rank fails, how, the exit codes of ranks 0 and 1, and words of each one's line.
FAULTS = {
    "memory in a step": (f"on(1, Trainer, '_step', fail({MEMORY}))", [4, 5], "on the GPU"),
    "bad item in validation": (
        "on(1, train_ds, 'evaluate', fail(DataError('/d/a.jpg: not a readable image')))",
        [4, 2],
        "/d/a.jpg: not a readable image",
    ),
    "disk full for one": ("if rank == 1: full_disk_at_save(2)", [4, 2], "disk seems to be full"),
}
SLOW = {
    "disk full for the main one": (
        "if rank == 0: full_disk_at_save(2)",
        [2, 4],
        "disk seems to be full",
    ),
    "data": (
        "if rank == 1: argv[argv.index('--dataset_dir') + 1] = '/nowhere'",
        [4, 2],
        "/nowhere: does not exist",
    ),
    "data of the main one": (
        "if rank == 0: argv[argv.index('--dataset_dir') + 1] = '/nowhere'",
        [2, 4],
        "/nowhere: does not exist",
    ),
    "flag": ("if rank == 1: argv.append('--nonsense')", [4, 2], "unrecognized arguments"),
    "memory while it builds": (
        f"on(1, build, 'build_model', fail({MEMORY}))",
        [4, 5],
        "on the GPU",
    ),
    "killed while it builds": ("on(1, build, 'build_model', die)", [4, -9], "without a word"),
    "killed in validation": ("on(1, train_ds, 'evaluate', die)", [4, -9], "without a word"),
    "killed in the last evaluation": (
        LAST.format(dies=1),
        [4, -9],
        "without a word",
    ),
    "main one killed in the last evaluation": (
        LAST.format(dies=0),
        [-9, 4],
        "without a word",
    ),
    "reading best": (
        "from utils.training import checkpoint\n"
        "on(1, checkpoint, 'load_weights', fail(ValueError('best: cannot be read')))",
        [4, 2],
        "best: cannot be read",
    ),
    "other number of ranks": (
        "if rank == 1: os.environ['WORLD_SIZE'] = '3'",
        [4, 4],
        "WORLD_SIZE is 3 on rank 1, 2 on rank 0",
    ),
    "another run": (
        "if rank == 1: argv[argv.index('--exp_name') + 1] = 'other'",
        [2, 2],
        "ranks of different runs have met",
    ),
    "stopped while it builds": (
        "on(1, build, 'build_model', lambda *_: os.kill(os.getpid(), signal.SIGTERM))",
        [130, 130],
        "stopped",
    ),
}


def trial_of(name: str, fault: str) -> Trial:
    argv = command(f"alone-{name.replace(' ', '-')}")
    return server().run("cores.train_ds", [], ranks=2, code=PROGRAM.format(argv=argv, fault=fault))


@pytest.mark.parametrize(
    "name", [*FAULTS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_all_end_with_the_cause(name):
    fault, codes, words = (FAULTS | SLOW)[name]
    started = time.perf_counter()
    trial = trial_of(name, fault)
    assert trial.codes == codes, trial.output
    assert time.perf_counter() - started < 45, "20 s of waiting for a rank, and the start"
    assert "Traceback" not in trial.output and "frame #" not in trial.output
    lines = [line for line in trial.output.splitlines() if words in line]
    assert len(lines) == 2 - codes.count(-9), trial.output
    folder = run_of(f"alone-{name.replace(' ', '-')}") / "ckpt"
    assert not list(folder.glob("*.partial"))
    assert not (folder / "last").exists() or checkpoint.faults(folder / "last") == []


def test_ranks_that_lost_one_go_on():
    """After a disk that was full for one rank, the same command ends as ever."""
    trial_of("goes on", FAULTS["disk full for one"][0])
    assert server().run("cores.train_ds", command("alone-goes-on"), ranks=2).codes == [0, 0]

"""Kills: at random times and at every kind of place where something could be left half done. The
same command continues.

A run that was killed any number of times must end as one that was not: the same weights, scores and
log, bit for bit.
"""

import random
import time
from pathlib import Path

import pytest

from cores.utils.training import checkpoint
from tests.chaos_toys import assert_same, command, rows, run_of, whole
from tests.fork_server import server


def assert_nothing_lost(run: Path, reference: Path, saved: int) -> int:
    """After a kill: a whole checkpoint that is not older than step ``saved``, in line with the
    uninterrupted run; its step."""
    last = run / "ckpt" / "last"
    last = last if last.is_dir() else last.with_name("last.old")
    if not last.is_dir():
        assert saved == 0
        return 0
    assert checkpoint.faults(last) == []
    progress = checkpoint.read_progress(last)
    step = progress["epoch"] * 3 + progress["step"]
    assert step >= saved
    losses = [row["loss"] for row in rows(reference) if row["kind"] == "train"]
    assert progress["recent"] == losses[:step]
    return step


def survive(name: str, kills: list[int | float], reference: Path, **job: object) -> int:
    """Starts the run ``name`` once for each of ``kills``, an event (int) or a time in seconds
    (float), then to its end.

    Returns how many kills met a running process.
    """
    met = saved = 0
    for kill in kills:
        if isinstance(kill, int):
            trial = server().run("cores.train_ds", command(name), die_at=kill, **job)
        else:
            trial = server().start("cores.train_ds", command(name), **job)
            time.sleep(kill)
            trial.kill()
            trial.wait()
        assert trial.codes[0] in (0, -9), trial.output
        met += trial.killed
        saved = assert_nothing_lost(run_of(name), reference, saved)
    trial = server().run("cores.train_ds", command(name), **job)
    assert trial.codes == [0], trial.output
    assert_same(run_of(name), reference)
    return met


def test_kills_change_nothing():
    """Between the two renames of a replacement, in a half written checkpoint and in a half written
    row of the log."""
    reference, trial, _ = whole()
    events = trial.events
    renames = [
        i for i, event in enumerate(events) if event == "rename" and i > events.index("step")
    ]
    away, anew = renames[1:3]
    assert anew == away + 1, "the second save replaces the first"
    assert (
        survive("few", [anew, events.index("half save"), events.index("half row")], reference) == 3
    )


KINDS = [
    "step",
    "step done",
    "row",
    "half row",
    "mkdir",
    "save",
    "half save",
    "fsync",
    "rename",
    "replace",
    "unlink",
    "rmdir",
    "copy",
    "half copy",
]


@pytest.mark.chaos
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_kind_of_event(kind):
    """One event of the kind in the first process, two random ones in those that continue."""
    reference, trial, _ = whole()
    draw = random.Random(kind)
    first = draw.choice([i for i, event in enumerate(trial.events) if event == kind])
    second, third = draw.randrange(len(trial.events) // 4), draw.randrange(10)
    # the second may find a run that is almost done
    assert survive(f"at-{kind}", [first, second, third], reference) >= 2


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_time(seed):
    reference, _, seconds = whole()
    draw = random.Random(seed)
    met = attempts = 0
    while met < 5:
        kills = [draw.uniform(0.1, 0.9) * seconds for _ in range(5 - met)]
        found = survive(f"timed-{seed}-{attempts}", kills, reference)
        # runs have become faster since the one that was timed: other work on the machine has ended
        if found < len(kills):
            seconds *= 0.7
        met += found
        attempts += 1
        assert attempts < 6, "runs end before they are killed"


@pytest.mark.chaos
def test_killed_with_data_workers():
    reference, _, seconds = whole()
    draw = random.Random(9)
    name = "workers"
    for _ in range(3):
        trial = server().start("cores.train_ds", command(name, workers=2))
        time.sleep(draw.uniform(0.2, 0.9) * seconds)
        trial.kill()
        trial.wait()
        assert trial.codes[0] in (0, -9), trial.output
    assert server().run("cores.train_ds", command(name, workers=2)).codes == [0]
    assert_same(run_of(name), reference)


@pytest.mark.chaos
def test_killed_while_an_index_is_built(tmp_path):
    """Every process builds it anew until one lives long enough."""
    reference, _, _ = whole()
    clean, cache = ({"CORES_CACHE": str(tmp_path / name)} for name in ("clean", "killed"))
    trial = server().run("cores.train_ds", command("indexed"), env=clean)
    before = trial.events.index("step")
    last_sync = max(i for i, event in enumerate(trial.events[:before]) if event == "rename")
    draw = random.Random(0)
    kills = sorted(draw.sample(range(3, last_sync), 7))
    assert survive("index", kills, reference, env=cache) == 7

    def content(folder: str) -> dict[str, bytes]:
        paths = (
            p
            for p in (tmp_path / folder / "index").rglob("*")
            if p.is_file() and "stamps" not in p.parts
        )
        return {str(p.relative_to(tmp_path / folder)): p.read_bytes() for p in paths}

    assert content("killed") == content("clean")


@pytest.mark.chaos
def test_killed_while_the_cache_is_filled(tmp_path):
    def argv(name: str) -> list[str]:
        return [*command("unused"), "--sam_cache", str(tmp_path / name)]

    def entries(name: str) -> dict[str, bytes]:
        return {
            str(p.relative_to(tmp_path / name)): p.read_bytes()
            for p in (tmp_path / name).rglob("*.safetensors")
        }

    started = time.perf_counter()
    trial = server().run("cores.utils.sam_cache", argv("clean"))
    seconds = time.perf_counter() - started
    assert trial.codes == [0], trial.output
    assert len(entries("clean")) == 11
    draw, met = random.Random(0), 0
    for _ in range(8):
        met += (
            server()
            .run("cores.utils.sam_cache", argv("killed"), die_at=draw.randrange(2, 12))
            .killed
        )
    for _ in range(4):
        trial = server().start("cores.utils.sam_cache", argv("killed"))
        time.sleep(draw.uniform(0.1, 0.9) * seconds)
        trial.kill()
        trial.wait()
        met += trial.killed
    assert met >= 8
    assert entries("killed").items() <= entries("clean").items(), "what is there is whole"
    assert server().run("cores.utils.sam_cache", argv("killed")).codes == [0]
    assert entries("killed") == entries("clean")
    # and training reads what the kills left as if there had been none
    reference, *_ = whole(sam_cache=str(tmp_path / "clean"))
    assert server().run(
        "cores.train_ds", command("filled", sam_cache=tmp_path / "killed")
    ).codes == [0]
    assert_same(run_of("filled"), reference)


@pytest.mark.chaos
def test_a_killed_rank_ends_the_others_and_nothing_is_lost():
    reference, *_ = whole(ranks=2)
    for number, (rank, step) in enumerate([(0, 2), (1, 4), (1, 6)]):
        started = time.perf_counter()
        trial = server().run(
            "cores.train_ds", command("ranks"), ranks=2, faults={"die_at_step": [step, rank]}
        )
        assert trial.codes[rank] == -9
        assert trial.codes[1 - rank] == 4, trial.output
        assert "another rank is gone" in trial.output
        assert f"the last checkpoint, of step {step - 1}" in trial.output
        assert time.perf_counter() - started < 60, number
    assert server().run("cores.train_ds", command("ranks"), ranks=2).codes == [0, 0]
    assert_same(run_of("ranks"), reference)

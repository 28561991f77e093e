"""What goes wrong around a training run ends in one line that says how to go on; the last
checkpoint is whole, and goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cores import train_ds
from cores.utils.settings.arguments import one_line
from cores.utils.training import checkpoint
from cores.utils.training.failures import StopSignals
from cores.utils.training.log import RunLog, read_log
from tests.backbone_toys import flags, toys, trained_run
from tests.chaos_toys import assert_same, command, run_of, whole
from tests.fork_server import ROOT, Trial, free_port, server


def fail(name: str, code: int, ranks: int = 1, **faults: list) -> str:
    """Runs into ``faults``; returns the one line of error."""
    trial = server().run("cores.train_ds", command(name), faults=faults, ranks=ranks)
    assert trial.codes == [code] * ranks, trial.output
    return error_of(trial)


def error_of(trial: Trial) -> str:
    assert "Traceback" not in trial.output
    (line,) = [line for line in trial.output.splitlines() if line.startswith("error: ")]
    return line


def assert_goes_on(name: str, ranks: int = 1) -> None:
    reference, *_ = whole(ranks)
    trial = server().run("cores.train_ds", command(name), ranks=ranks)
    assert set(trial.codes) == {0}, trial.output
    assert_same(run_of(name), reference)


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("stage", [0, 2])  # without and with a gradient norm from DeepSpeed
def test_a_gradient_that_is_not_finite_names_the_samples_and_saves_nothing(stage):
    name = f"gradient-{stage}"
    argv = command(name, zero_stage=stage)
    line = error_of(server().run("cores.train_ds", argv, faults={"nan_gradient": [4]}))
    assert "step 4: the gradient is not finite" in line
    assert "Toy|train 00" in line or "coco|toy" in line
    assert f"the last checkpoint, of step 3, is in {run_of(name) / 'ckpt' / 'last'}" in line
    weights = checkpoint.read_weights(run_of(name) / "ckpt" / "last")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_a_loss_far_above_the_others_is_logged_with_its_samples(caplog):
    long = {"epochs": 1, "steps_per_epoch": 12, "print_freq": 100, "no_eval": "true"}
    assert train_ds.main(flags(toys(), exp_name="spikes", spike_factor=0.5, **long)) == 0
    log = read_log(toys() / "runs" / "spikes" / "log.jsonl")
    assert [row["step"] for row in log] == [
        11,
        12,
    ], "ten losses before it, and there is something to compare with"
    assert all(name.startswith("Toy|train 00") for row in log for name in row["samples"])
    assert log[0]["loss"] > 0.5 * log[0]["median"]
    assert "step 11: loss" in caplog.text
    assert train_ds.main(flags(toys(), exp_name="calm", spike_factor=0, **long)) == 0
    assert [row["step"] for row in read_log(toys() / "runs" / "calm" / "log.jsonl")] == [12]


# -------------------------------------------------------------------------------------------- disks


def test_a_full_disk_leaves_the_last_checkpoint():
    line = fail("full", 2, full_disk_at_save=[3])
    assert str(run_of("full") / "ckpt" / "last.partial") in line
    assert (
        "the disk seems to be full" in line and "free space, and the same command continues" in line
    )
    assert not (run_of("full") / "ckpt" / "last.partial").exists(), (
        "what was written of it is removed"
    )
    assert checkpoint.faults(run_of("full") / "ckpt" / "last") == []
    assert_goes_on("full")


def test_a_disk_that_is_full_from_the_start():
    line = fail("full-early", 2, full_disk=[1500])
    assert str(run_of("full-early") / "config.json") in line and "free space" in line
    assert not (run_of("full-early") / "config.json.partial").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_row_that_cannot_be_written(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log = RunLog(tmp_path, {"train": 0})
    with pytest.raises(OSError, match=r"log\.jsonl: cannot be written \(No space left on device\)"):
        log.write({"step": 1, "loss": 1.0}, "train")
    log.close()


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    """A file system of 1.5 MB holds one checkpoint of 0.5 MB with its copy, but not a third."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "none", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        trial = server().run("cores.train_ds", command("tiny-disk", log_base_dir=tmp_path))
        last = tmp_path / "tiny-disk" / "ckpt" / "last"
        assert trial.codes == [2], trial.output
        assert "free space" in error_of(trial)
        assert checkpoint.faults(last) == [] and checkpoint.read_progress(last)
        subprocess.run(["mount", "-o", "remount,size=20m", tmp_path], check=True)
        assert server().run(
            "cores.train_ds", command("tiny-disk", log_base_dir=tmp_path)
        ).codes == [0]
        assert_same(tmp_path / "tiny-disk", whole()[0])
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_run_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train_ds.main(flags(toys(), log_base_dir=tmp_path / "file")) == 2
    line = capsys.readouterr().err
    assert (
        f"{tmp_path / 'file' / 'run'}: the run folder cannot be written (Not a directory)" in line
    )
    assert "--log_base_dir" in line and line.count("\n") == 1


# -------------------------------------------------------------------------------- workers and ranks


def test_a_data_worker_that_dies():
    name = "dead-worker"
    trial = server().run("cores.train_ds", command(name, workers=2), faults={"worker_killed": [3]})
    assert trial.codes == [4], trial.output
    line = error_of(trial)
    step = re.search(r"step (\d): DataLoader worker \(pid", line)[1]
    assert step in "34", "it may have prepared the batch of step 3 before it died"
    assert "lower --workers (now 2) or --batch_size (now 2)" in line
    assert f"the last checkpoint, of step {int(step) - 1}" in line
    assert checkpoint.faults(run_of(name) / "ckpt" / "last") == []


def test_a_data_worker_that_hangs_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cores.utils.training.loader.STUCK_AFTER", 1)
    monkeypatch.setattr("cores.utils.training.loader.WORKER_GRACE", 1)
    monkeypatch.setattr("cores.dataset.mixture.TrainMixture.__getitem__", lambda *_: time.sleep(30))
    how = {"workers": 1, "no_eval": "true", "log_base_dir": tmp_path, "epochs": 1}
    assert train_ds.main(flags(toys(), **how)) == 4
    (line,) = [row for row in capsys.readouterr().err.splitlines() if row.startswith("error: ")]
    assert "timed out after 1 seconds" in line and "a data worker hangs" in line


def test_an_item_that_breaks_in_a_data_worker_is_one_line(tmp_path):
    shutil.copytree(toys() / "data", tmp_path / "data")
    argv = flags(
        toys(), exp_name="bad-item", dataset_dir=tmp_path / "data", workers=1, no_eval="true"
    )
    line = error_of(
        server().run("cores.train_ds", argv, faults={"images_lost": [1, str(tmp_path)]})
    )
    assert line.startswith(f"error: {tmp_path}/data/reason_seg/Toy/train/00")
    assert line.endswith("replace or remove the file")


def test_words_of_errors():
    assert one_line(ValueError("a\n b")) == "a b"
    assert one_line(ValueError("a\x1b[2J\udcffb")) == "a [2J b", (
        "nothing steers the terminal or fails to be printed"
    )
    assert one_line(MemoryError()) == "MemoryError"
    caught = (
        "Caught DataError in DataLoader worker process 0.\nOriginal Traceback:\n  x\na.b.DataError:"
        " f: 3"
    )
    assert one_line(ValueError(caught)) == "f: 3"


# ------------------------------------------------------------------------------------------ signals


LATE = [pytest.param(moment, marks=pytest.mark.chaos) for moment in ("save", "twice")]


@pytest.mark.parametrize("moment", ["validation", *LATE])
def test_sigterm_at_a_bad_moment(moment):
    name = f"term-{moment}"
    started = time.perf_counter()
    trial = server().run("cores.train_ds", command(name), faults={"stop_in": [moment]})
    assert trial.codes == [130], trial.output
    assert time.perf_counter() - started < 30
    expected = 3 if moment == "validation" else 1
    assert f"stopped at step {expected}; the same command continues" in trial.output
    assert trial.output.count("SIGTERM: stopping") == 1
    assert_goes_on(name)


def test_a_terminal_that_is_closed_saves_unless_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # The tests may run under nohup.
    try:
        stop = StopSignals()
        with stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopSignals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_sigterm_for_one_of_two_ranks_stops_both():
    trial = server().run(
        "cores.train_ds", command("one-of-two"), ranks=2, faults={"stop_at_step": [2, 1]}
    )
    assert trial.codes == [130, 130], trial.output
    assert_goes_on("one-of-two", ranks=2)


LONG = {"steps_per_epoch": 60, "epochs": 1, "save_every": 0, "workers": 1}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "deepspeed", "torchrun"])
def test_sigterm_to_a_launcher(launcher):
    """The launcher signals data workers, too; the state is there within 30 s, and the run ends as
    if nothing had happened."""
    ranks, name = 1 if launcher == "python" else 2, f"launched-{launcher}"
    bin_ = Path(sys.executable).parent
    start = {
        "python": [sys.executable],
        "deepspeed": [bin_ / "deepspeed", "--num_gpus", "2", "--master_port", str(free_port())],
        "torchrun": [bin_ / "torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())],
    }[launcher]
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in ours} | {"OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{bin_}{os.pathsep}{env['PATH']}"
    run = run_of(name)
    process = subprocess.Popen(
        [*start, "train_ds.py", *command(name, **LONG)], cwd=ROOT, env=env, start_new_session=True
    )
    try:
        wait_for(
            lambda: (run / "log.jsonl").is_file() and len(read_log(run / "log.jsonl")) >= 5, 180
        )
        stopped = time.perf_counter()
        if launcher == "torchrun":
            process.terminate()
        # as a terminal or a batch system does, data workers included; `deepspeed` itself passes
        # nothing on
        else:
            os.killpg(process.pid, signal.SIGTERM)
        wait_for(
            lambda: checkpoint.read_progress(run / "ckpt" / "last"),
            30 - (time.perf_counter() - stopped),
        )
        process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert 5 <= checkpoint.read_progress(run / "ckpt" / "last")["step"] < 60
    argv = command(name, **LONG)
    assert set(server().run("cores.train_ds", argv, ranks=ranks).codes) == {0}
    assert_same(run, whole(ranks, **LONG)[0])


def wait_for(condition, seconds: float) -> None:
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "too late"
        time.sleep(0.02)


# ------------------------------------------------------------------------------ damaged checkpoints


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(trained_run(), tmp_path / "run")


def again(run: Path, *more: str) -> int:
    return train_ds.main([*flags(toys(), log_base_dir=run.parent, exp_name="run"), *more])


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


MODEL = "state/mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        (MODEL, cut, "cut off"),
        (MODEL, flip, "damaged"),
        ("state/zero_pp_rank_0_mp_rank_00_optim_states.pt", Path.unlink, "missing"),
        ("random_0.pt", cut, "cut off"),
        ("progress.json", cut, "missing or damaged"),
        ("progress.json", Path.unlink, "missing or damaged"),
        ("files.json", cut, "damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_the_way_on(run, capsys, file, damage, words):
    last = run / "ckpt" / "last"
    before = sorted(p.name for p in last.rglob("*"))
    damage(last / file)
    assert again(run) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {last / file}: {words}") and line.count("\n") == 1
    assert (
        f"best is whole: the same command with --resume {run / 'ckpt' / 'best'} continues from"
        " epoch 1" in line
    )
    assert len(before) - len(sorted(last.rglob("*"))) == (damage is Path.unlink), (
        "nothing else is touched"
    )


def test_the_way_on_leads_to_the_same_end(run):
    (run / "ckpt" / "last" / MODEL).unlink()
    assert again(run, "--resume", str(run / "ckpt" / "best")) == 0
    ours, theirs = (checkpoint.read_weights(r / "ckpt" / "last") for r in (run, trained_run()))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [row["step"] for row in read_log(run / "log.jsonl") if row["kind"] == "train"] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_a_lost_last_checkpoint_does_not_start_over_in_silence(run, capsys):
    shutil.rmtree(run / "ckpt" / "last")
    assert again(run) == 2
    assert "last: missing; best is whole" in capsys.readouterr().err
    shutil.rmtree(run / "ckpt" / "best" / "state")
    assert again(run) == 2
    assert "there is no other checkpoint" in capsys.readouterr().err
    assert again(run, "--no-auto_resume") == 0


def test_checkpoints_from_before_sizes_were_kept_still_serve(run):
    (run / "ckpt" / "last" / "files.json").unlink()
    assert again(run) == 0


def test_a_best_checkpoint_whose_copy_was_killed_is_copied_by_the_next_process(run):
    """The score of the last epoch was the best, its checkpoint is still the one before."""
    last, best = run / "ckpt" / "last", run / "ckpt" / "best"
    progress = checkpoint.read_progress(last)
    checkpoint.write_progress(last, progress | {"best": 0.5, "best_step": 6})
    assert checkpoint.read_progress(best)["epoch"] == 1
    assert again(run) == 0
    assert checkpoint.read_progress(best) == checkpoint.read_progress(last)
    assert checkpoint.faults(best) == []


def test_a_kill_in_the_copy_to_best_keeps_one(run):
    """Between the two renames only ``best.old`` is whole: the next copy must not begin by removing
    it."""
    best = run / "ckpt" / "best"
    best.rename(run / "ckpt" / "best.old")
    checkpoint.copy(run / "ckpt" / "last", best)
    assert checkpoint.faults(best) == [] and not (run / "ckpt" / "best.old").exists()


# ---------------------------------------------------------------------------------------------- log


def test_a_log_continues_where_the_checkpoint_is(tmp_path):
    rows = [{"kind": "train", "step": step} for step in (1, 2, 3, 4)] + [
        {"kind": "val", "step": 2},
        {"kind": "val", "step": 3},
    ]
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "train", "st'
    )
    log = RunLog(tmp_path, {"train": 3, "val": 2})
    log.write({"step": 4, "loss": 0.5}, "train")
    log.close()
    found = [(row["kind"], row["step"]) for row in read_log(tmp_path / "log.jsonl")]
    assert found == [("train", 1), ("train", 2), ("train", 3), ("val", 2), ("train", 4)]
    assert (tmp_path / "log.jsonl").read_text().endswith('"loss": 0.5}\n')

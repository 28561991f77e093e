"""One training per run folder, and no lock outlives its process."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from cores.utils.settings.flags import UsageError
from cores.utils.training import lock
from tests.chaos_toys import command, run_of
from tests.fork_server import server

HOLD = """
import os, sys, time
from pathlib import Path
from cores.utils.training import lock
ready, tell = os.pipe()
with lock.owned(Path(sys.argv[1])):
    if not os.fork():  # as a data worker
        os.write(tell, b".")  # It has let go of what it was born with.
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_training_leaves_no_lock_though_its_worker_lives(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match=f"process {holder.pid} on "), lock.owned(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with lock.owned(tmp_path):
            assert str(os.getpid()) in (tmp_path / "lock").read_text()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.owned(tmp_path):
        assert "has no locks" in caplog.text


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"), lock.owned(tmp_path / "file" / "x"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_two_trainings_and_the_first_ends_as_if_alone(ranks):
    server()  # It takes longer to start than the first training may have left.
    name = f"two-{ranks}"
    long = {"steps_per_epoch": 100, "epochs": 1, "no_eval": "true"}
    first = subprocess.Popen(
        [sys.executable, "train_ds.py", *map(str, command(name, **long))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (run_of(name) / "log.jsonl").is_file():
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    trial = server().run("cores.train_ds", command(name, **long), ranks=ranks)
    assert set(trial.codes) == {2}, trial.output
    assert "another training is at work here" in trial.output and "Traceback" not in trial.output
    first.communicate()
    assert first.returncode == 0
    assert (run_of(name) / "log.jsonl").read_text().count("\n") == 100


@pytest.mark.slow
def test_a_lost_terminal_stops_as_sigterm_does():
    name, long = "hangup", {"steps_per_epoch": 60, "epochs": 1, "no_eval": "true", "save_every": 0}
    trial = server().start("cores.train_ds", command(name, **long))
    while not (run_of(name) / "log.jsonl").is_file():
        time.sleep(0.02)
    trial.kill(signal.SIGHUP)
    assert trial.wait() == 130, trial.output
    assert (run_of(name) / "ckpt" / "last" / "progress.json").is_file()

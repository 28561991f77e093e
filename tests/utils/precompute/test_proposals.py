"""Proposals computed before a run, by processes that may be killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cores.utils.precompute import proposals
from tests.backbone_toys import flags, toys


def argv(store: Path, *more: str, **changes: object) -> list[str]:
    how = {"method": "llm_seg", "levels": "SEG", "features": "sam", "no_eval": "true"}
    return [*flags(toys(), proposals=store, **(how | changes)), *more]


def test_a_damaged_entry_is_computed_again_and_said(tmp_path, capsys, caplog):
    assert proposals.main(argv(tmp_path)) == 0
    assert "4 computed" in capsys.readouterr().out
    files = sorted(tmp_path.rglob("*.json"))
    whole = [file.read_bytes() for file in files]
    files[0].write_bytes(whole[0].replace(b"0.", b"1.", 1)[:-1] + b" ")
    files[1].write_bytes(whole[1][:50])
    assert proposals.main(argv(tmp_path)) == 0
    assert "2 computed" in capsys.readouterr().out
    assert [file.read_bytes() for file in files] == whole
    assert all(file.name in caplog.text for file in files[:2])


@pytest.mark.slow
def test_a_killed_worker_ends_in_one_line_and_keeps_what_was_computed(tmp_path):
    command = [sys.executable, "-m", "cores.utils.precompute_proposals"]
    many = argv(tmp_path, "--jobs", "2", epochs=2000, proposal_points=16)
    process = subprocess.Popen([*command, *many], stderr=subprocess.PIPE, text=True)
    while not (kept := list(tmp_path.rglob("*.json"))) and process.poll() is None:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    worker = next(c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes())
    os.kill(int(worker), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    last = err.strip().splitlines()[-1]
    assert process.returncode == 4 and "BrokenProcessPool" not in err, err[-2000:]
    assert last.startswith("error: one of the 2 processes was killed")
    assert all(file.exists() for file in kept)

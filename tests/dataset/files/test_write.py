"""Files and folders that are written are whole, or were not touched."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cores.dataset.files.write import DISK_FULL, all_or_nothing, disk_error, write_text, writing
from tests.faults.commands import full_disk


def old(path: Path) -> Path:
    path.write_text("old")
    return path


def stop(_: object = None, error: BaseException | None = None) -> None:
    raise error or KeyboardInterrupt


WRITERS = {
    "text": lambda path: path.write_text("x" * 5000),
    "numpy": lambda path: np.save(path.open("wb"), np.zeros(5000)),
    "torch": lambda path: torch.save(torch.zeros(5000), path),
    "safetensors": lambda path: save_file({"a": torch.zeros(5000)}, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_known_whoever_writes(name, tmp_path):
    path = old(tmp_path / "a")
    with (
        pytest.raises(OSError, match="large|full") as caught,
        full_disk(),
        writing(path) as partial,
    ):
        WRITERS[name](partial)
    assert caught.value.errno in DISK_FULL and caught.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_text() == "old"


def test_the_new_content_is_whole(tmp_path):
    path = tmp_path / "deep" / "er" / "a"
    write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    with pytest.raises(KeyboardInterrupt), writing(path) as partial:
        stop(partial.write_text("half"))
    assert path.read_text(encoding="utf-8") == "é\n" and len(list(path.parent.iterdir())) == 1


def test_other_faults_stay_what_they_are(tmp_path):
    for error in (FileNotFoundError(errno.ENOENT, "gone", "/input"), ValueError("x")):
        (tmp_path / "b").mkdir()
        with pytest.raises(type(error)) as caught, all_or_nothing(tmp_path / "a", tmp_path / "b"):
            stop(error=error)
        assert caught.value is error and not (tmp_path / "b").exists()
    assert disk_error(RuntimeError("mat1 and mat2 shapes")) is None
    assert disk_error(Exception("I/O error (os error 28)")).errno == errno.ENOSPC

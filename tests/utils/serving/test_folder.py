"""The folder of what visitors send: its limit, and that it goes."""

import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from cores.utils.serving.folder import PREFIX, ServedFolder, TryLater


def send(folder: ServedFolder, name: str, size: int, age: float = 0) -> Path:
    path = folder.path / name / "p.png"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(size)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_it_goes_at_its_end(tmp_path):
    with ServedFolder(10, tmp_path) as folder:
        send(folder, "a", 3)
        assert folder.used() == 3
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_two_names_counts_once(tmp_path):
    with ServedFolder(10, tmp_path) as folder:
        path = send(folder, "a", 3)
        (folder.new() / "p.png").hardlink_to(path)
        assert folder.used() == 3
        folder.sweep(0)
        assert folder.used() == 3, "a conversation still has it"


def test_what_was_there_at_first_and_what_belongs_to_somebody_stays(tmp_path):
    with ServedFolder(10, tmp_path) as folder:
        example = send(folder, "example", 1, age=10_000)
        folder.keep_all()
        own = folder.new() / "p.png"
        own.touch()
        os.utime(own, (0, 0))
        old, young = send(folder, "old", 1, age=601), send(folder, "young", 1, age=500)
        loose = folder.path / "loose.bin"
        loose.touch()
        os.utime(loose, (0, 0))
        folder.sweep()
        assert [p.exists() for p in (example, own, old, young, loose)] == [1, 1, 0, 1, 0]


def test_room_counts_what_is_still_coming(tmp_path):
    with ServedFolder(10, tmp_path) as folder:
        with folder.receiving(6), pytest.raises(TryLater, match="try again later"):
            folder.require(5)
        folder.require(10)
        with pytest.raises(ZeroDivisionError), folder.receiving(10):
            raise ZeroDivisionError
        folder.require(10)


def test_where_room_is_short_what_nobody_opened_goes_sooner(tmp_path):
    with ServedFolder(10, tmp_path) as folder:
        send(folder, "a", 6, age=31)
        send(folder, "b", 4, age=5)
        folder.require(6)
        with pytest.raises(TryLater):
            folder.require(7)


def test_only_ours_and_only_what_is_dead_is_removed(tmp_path):
    dead, unlocked, other = (tmp_path / f"{PREFIX}{name}" for name in ("dead", "unlocked", "x"))
    for folder in (dead, unlocked):
        folder.mkdir()
    (dead / "lock").touch()
    target = tmp_path / "precious"
    target.mkdir()
    (target / "lock").touch()
    other.symlink_to(target)
    with ServedFolder(10, tmp_path) as running, ServedFolder(10, tmp_path):
        assert running.path.exists()
    assert sorted(tmp_path.iterdir()) == sorted([unlocked, other, target])
    assert (target / "lock").exists()


def test_a_folder_that_begins_is_not_taken_for_a_dead_one(tmp_path):
    """Between its making and its lock it has no file of that name."""
    begins = tmp_path / f"{PREFIX}begins"
    begins.mkdir()
    with FileLock(begins / "starting"), ServedFolder(10, tmp_path):
        assert begins.exists()

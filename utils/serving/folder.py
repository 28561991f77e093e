"""The folder of what visitors send and get.

Its size has a limit, it goes with its process, and the next process removes it where that one was
killed.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

PREFIX = "cores-app-"
LOCK = "lock"
CONVERSATION = "conversation-"  # begins the names of folders that ``ServedFolder.new`` makes
# Seconds until a file goes that was sent and not opened. A page opens what it sends at once.
UNOPENED_AFTER = 600
UNOPENED_WHEN_FULL = 30


class TryLater(ValueError):
    """A limit is reached; the message is for the visitor, who is not to blame."""


class ServedFolder:
    """A folder ``path`` that can be read by others, of at most ``most`` bytes; a context manager,
    at whose end it is removed.

    All files that do not lie in a conversation's folder and were not there when ``keep_all`` was
    called were sent by somebody, and go if nobody opens them.
    """

    def __init__(self, most: int, parent: Path | None = None):
        """``parent``: of the folder, default the system's for temporary files. What killed
        processes left there is removed."""
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        _remove_leftovers(parent)
        self.most = most
        self._base = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        # Another process takes a folder whose lock is free for one that was left behind, so the
        # lock gets its name when it is held.
        self._lock = FileLock(self._base / "starting", 0, thread_local=False)
        self._lock.acquire()
        os.rename(self._base / "starting", self._base / LOCK)
        self.path = self._base / "files"
        self.path.mkdir()
        self._kept: set[str] = set()
        self._coming = 0

    def __enter__(self) -> ServedFolder:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._base, ignore_errors=True)
        with suppress(OSError):
            self._lock.release(force=True)

    def keep_all(self) -> None:
        """What is there now stays until the end."""
        self._kept = {entry.name for entry in self.path.iterdir()}

    def new(self) -> Path:
        """A folder that stays until the caller removes it. Nobody can guess its name."""
        folder = self.path / f"{CONVERSATION}{secrets.token_hex(16)}"
        folder.mkdir()
        return folder

    def used(self) -> int:
        """Bytes of all files; one with several names counts once."""
        sizes = {}
        for state in _files(self.path):
            sizes[state.st_dev, state.st_ino] = state.st_size
        return sum(sizes.values())

    def sweep(self, age: float = UNOPENED_AFTER) -> None:
        """Removes what was sent at least ``age`` seconds ago and belongs to no conversation."""
        for entry in list(self.path.iterdir()):
            if entry.name in self._kept or entry.name.startswith(CONVERSATION):
                continue
            if time.time() - max((s.st_mtime for s in _files(entry)), default=0) >= age:
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)

    def require(self, size: int) -> None:
        """Raises TryLater where ``size`` further bytes are too many."""
        if self.used() + self._coming + size > self.most:
            self.sweep(UNOPENED_WHEN_FULL)
        if self.used() + self._coming + size > self.most:
            raise TryLater("The page has no room for further files now; try again later.")

    @contextmanager
    def receiving(self, size: int) -> Iterator[None]:
        """Keeps room for ``size`` bytes while they come. Raises TryLater where there is none."""
        self.require(size)
        self._coming += size
        try:
            yield
        finally:
            self._coming -= size


def _files(path: Path) -> Iterator[os.stat_result]:
    """The states of all files at or below ``path``; one that goes meanwhile is left out."""
    paths = [path] if not path.is_dir() else [Path(f, n) for f, _, ns in os.walk(path) for n in ns]
    for file in paths:
        with suppress(FileNotFoundError):
            yield file.lstat()


def _remove_leftovers(parent: Path) -> None:
    """Removes the folders of processes that are no more: our own folders whose lock is free."""
    for base in parent.glob(f"{PREFIX}*"):
        with suppress(OSError, Timeout):
            state = base.lstat()
            user = os.getuid() if hasattr(os, "getuid") else state.st_uid
            ours = stat.S_ISDIR(state.st_mode) and state.st_uid == user
            if ours and stat.S_ISREG((base / LOCK).lstat().st_mode):
                with FileLock(base / LOCK, 0):
                    shutil.rmtree(base, ignore_errors=True)

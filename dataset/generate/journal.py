"""The journal: every request and every reply as one JSON per line with its checksum, in the order
of arrival, on disk before it is used."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cores.dataset.files.errors import DamagedRecords, DataError
from cores.dataset.files.sealed import seal, unseal


@dataclass(frozen=True)
class Answer:
    """What a model answered to one request."""

    text: str
    finish: str
    """The server's reason to stop: "stop"; "length" where the text is cut off; "refusal"."""
    tokens_in: int | None = None
    """None where the server does not count."""
    tokens_out: int | None = None


def read_answers(path: Path) -> tuple[dict[str, Answer], int]:
    """(answers by key, length in bytes of the complete lines). A last line without its end was cut
    off by a kill.

    Raises DataError for any other damaged line.
    """
    answers: dict[str, Answer] = {}
    length = 0
    if not path.exists():
        return answers, length
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                break
            length += len(line)
            try:
                record = unseal(line)
                if record["answer"] is not None:
                    answers[record["key"]] = Answer(**record["answer"])
            except (DamagedRecords, TypeError, KeyError):
                raise DataError(
                    f"{path}: line {number} is damaged; remove it, and its request is sent again"
                ) from None
    return answers, length


class Journal:
    """An append-only file that one process writes; its threads share it."""

    def __init__(self, path: str | Path):
        """Raises DataError if another run writes to it or a line is damaged."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        # Between processes. The system releases it if this one is killed.
        self._process_lock = FileLock(self.path.with_suffix(".lock"), 0, thread_local=False)
        try:
            self._process_lock.acquire()
        except Timeout:
            raise DataError(
                f"{self.path}: another run writes to this journal; wait for it or choose another"
                " --out"
            ) from None
        try:
            self._answers, length = read_answers(self.path)
            self._stream = self.path.open("ab")
        except BaseException:
            self._unlock()
            raise
        # A line that a kill cut off is no record, and the next line must not continue it.
        self._stream.truncate(length)

    def answer(self, key: str) -> Answer | None:
        return self._answers.get(key)

    def append(self, key: str, answer: Answer | None, **facts: Any) -> None:
        """Writes one attempt; when this returns, it is on the disk. ``answer``: None for an attempt
        that failed."""
        record = {"key": key, **facts, "answer": None if answer is None else asdict(answer)}
        line = seal(record) + b"\n"
        with self._lock:
            self._stream.write(line)
            self._stream.flush()
            os.fsync(self._stream.fileno())
            if answer is not None:
                self._answers[key] = answer

    def close(self) -> None:
        self._stream.close()
        self._unlock()

    def _unlock(self) -> None:
        # The lock's file goes while the lock is held, so nobody can hold a file that has gone.
        # Windows refuses this, but there releasing the lock removes the file.
        with contextlib.suppress(OSError):
            Path(self._process_lock.lock_file).unlink()
        self._process_lock.release()

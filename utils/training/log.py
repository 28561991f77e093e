"""log.jsonl: one row for every reported step and every validation. A run that goes on continues the
file without doubled rows."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cores.dataset.files.write import write_text
from cores.utils.training.trackers import Trackers, numbers_of

logger = logging.getLogger(__name__)


class RunLog:
    """log.jsonl and ``trackers``, which have every step once even if the run did it several times.

    ``done``: for each kind of row, "train" and "val", the last step that the run need not do again.
    Later rows are dropped, because they will be written anew, and so is a row that a kill cut off.
    Other lines that are damaged are left out, and ``log.jsonl.bad`` keeps what was there.
    Every method raises OSError, one line, where the file cannot be written.
    """

    def __init__(self, run: Path, done: dict[str, int], trackers: Trackers | None = None):
        self.path = run / "log.jsonl"
        self.trackers = trackers or Trackers()
        self.reported: dict[str, int] = {}  # the last step that trackers were told, by kind of row
        run.mkdir(parents=True, exist_ok=True)
        with self._one_line():
            if self.path.is_file():
                rows, damaged = _parse(self.path.read_bytes())
                if damaged:
                    kept_as = self.path.with_name("log.jsonl.bad")
                    shutil.copyfile(self.path, kept_as)
                    words = "%s: %s left out; %s keeps the file as it was"
                    logger.warning(words, self.path, _named(damaged), kept_as.name)
                for row in rows:
                    self.reported[row["kind"]] = max(row["step"], self.reported.get(row["kind"], 0))
                kept = [row for row in rows if row["step"] <= done.get(row["kind"], 0)]
                write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
            self.stream = self.path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any], kind: str) -> None:
        with self._one_line():
            self.stream.write(json.dumps({"kind": kind, **row}) + "\n")
            self.stream.flush()
        again = row["step"] <= self.reported.get(kind, 0)
        self.trackers.scalars(numbers_of(row, kind), row["step"], again)

    def sync(self) -> None:
        """Returns when the rows so far would survive a power cut."""
        with self._one_line():
            os.fsync(self.stream.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # A full disk was reported when it was met.
            self.stream.close()

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())
            raise OSError(
                f"{self.path}: cannot be written ({reason}); repair that, and the same command"
                " continues"
            ) from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.jsonl. Damaged lines are left out with a warning, a last one that a kill
    cut off without."""
    rows, damaged = _parse(path.read_bytes())
    if damaged:
        logger.warning("%s: %s left out", path, _named(damaged))
    return rows


def _parse(content: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows, and the numbers of the lines that are damaged."""
    rows, damaged = [], []
    *lines, rest = content.decode("utf-8", errors="replace").split("\n")
    for number, line in enumerate([*lines, rest], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if (
            isinstance(row, dict)
            and isinstance(row.get("kind"), str)
            and type(row.get("step")) is int
            and row["step"] >= 0
        ):
            rows.append(row)
        elif line.strip() and number <= len(lines):
            damaged.append(number)
    return rows, damaged


def _named(lines: list[int]) -> str:
    shown = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
    return f"damaged line {shown}" if len(lines) == 1 else f"{len(lines)} damaged lines ({shown})"

"""log.jsonl: one row for every reported step and every validation. A run that goes on continues the
file without doubled rows."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset.files.write import write_text


class RunLog:
    """log.jsonl and TensorBoard, which have every step once even if the run did it several times.

    ``done``: for each kind of row, "train" and "val", the last step that the run need not do again.
    Later rows are dropped, because they will be written anew, and so is a row that a kill cut off.
    Every method raises OSError, one line, where the file cannot be written.
    """

    def __init__(self, run: Path, done: dict[str, int]):
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "log.jsonl"
        run.mkdir(parents=True, exist_ok=True)
        with self._one_line():
            if self.path.is_file():
                rows = read_log(self.path)
                kept = [row for row in rows if row["step"] <= done.get(row["kind"], 0)]
                write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
            self.stream = self.path.open("a", encoding="utf-8")
            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=done["train"] + 1)

    def write(self, row: dict[str, Any], kind: str) -> None:
        with self._one_line():
            self.stream.write(json.dumps({"kind": kind, **row}) + "\n")
            self.stream.flush()
            for name, value in row.items():
                if isinstance(value, (int, float)) and name not in ("step", "epoch"):
                    self.board.add_scalar(f"{kind}/{name}", value, row["step"])

    def sync(self) -> None:
        """Returns when the rows so far would survive a power cut."""
        with self._one_line():
            os.fsync(self.stream.fileno())

    def close(self) -> None:
        for part in (self.stream, self.board):
            with contextlib.suppress(OSError):  # A full disk was reported when it was met.
                part.close()

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
    """The rows of a log.jsonl up to the first one that a kill cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not {"kind", "step"} <= row.keys():
            break
        rows.append(row)
    return rows

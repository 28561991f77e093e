"""What a comparison with the published code found, as a table; and the files that it was recorded
in."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from cores.model.checkpoints.weights import read_file, read_json_file

LOSS_TOLERANCE = 1e-4
METRIC_TOLERANCE = 1e-4
# noise floor of a tensor that noise.json does not name, of its largest value: what the recorded
# ones show
UNRECORDED = 3e-6
# of a tensor's largest value: what one float32 operation in another order may change
ROUNDING = 1e-6


@dataclass
class Row:
    """One comparison. ``error`` and ``tolerance`` in the unit of the values, or in pixels or tokens
    that differ."""

    name: str
    error: float
    tolerance: float
    unit: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN, too

    def share(self) -> float:
        """Of the tolerance that is used up: above 1 beyond it."""
        if self.tolerance and not math.isnan(self.error):
            return self.error / self.tolerance
        return 0.0 if self.ok else math.inf


@dataclass
class Table:
    """What was compared in one case, and what was left out and why."""

    case: str
    factor: float = 10.0
    noise: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, error: float, tolerance: float, unit: str = "") -> None:
        self.rows.append(Row(name, float(error), tolerance, unit))

    def tensors(
        self, name: str, ours: Tensor, theirs: Tensor, tolerance: float | None = None
    ) -> None:
        """Largest difference; ``tolerance`` None: the noise floor of ``name`` times the factor."""
        if ours.shape != theirs.shape:
            self.add(
                f"{name}: shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}",
                float("inf"),
                0.0,
            )
            return
        ours, theirs = ours.detach().double(), theirs.double()
        if tolerance is None:
            largest = theirs.abs().max().item() if theirs.numel() else 0.0
            tolerance = self.factor * self.floor(name, theirs) + ROUNDING * max(1.0, largest)
        self.add(name, (ours - theirs).abs().max().item() if theirs.numel() else 0.0, tolerance)

    def floor(self, name: str, theirs: Tensor) -> float:
        """The noise floor of a recorded tensor."""
        if name in self.noise or not theirs.numel():
            return self.noise.get(name, 0.0)
        return UNRECORDED * theirs.abs().max().item()

    def equal(self, name: str, ours: Tensor, theirs: Tensor, unit: str = "tokens") -> None:
        """Number of places that differ; none may."""
        if ours.shape != theirs.shape:
            self.add(
                f"{name}: shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}",
                float("inf"),
                0.0,
                unit,
            )
        else:
            self.add(name, (ours != theirs).sum().item(), 0, unit)

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)

    def worst(self) -> list[tuple[str, int, Row]]:
        """(run, number of comparisons, the row nearest to its tolerance or beyond it) of every run,
        in order."""
        runs: dict[str, list[Row]] = {}
        for row in self.rows:
            runs.setdefault(re.split(r"[.: ]", row.name)[0], []).append(row)
        return [(run, len(rows), max(rows, key=Row.share)) for run, rows in runs.items()]

    def text(self, everything: bool = False) -> str:
        """A line for every run with its largest error, then the rows that fail, or all of them."""
        lines = [
            f"{self.case}: {len(self.rows)} comparisons, {sum(not row.ok for row in self.rows)}"
            " beyond tolerance"
        ]
        lines.append(f"  {'run':<24} compared  {'max error':<9}  may be     in")
        for run, count, row in self.worst():
            lines.append(
                f"  {run:<24} {count:>8}  {row.error:<9.3g}  {row.tolerance:<9.3g}  {row.name}"
                f" {row.unit}".rstrip()
            )
        for row in self.rows:
            if everything or not row.ok:
                mark = "ok  " if row.ok else "FAIL"
                lines.append(
                    f"  {mark} {row.name:<70} {row.error:.3g} (may be {row.tolerance:.3g})"
                    f" {row.unit}".rstrip()
                )
        lines += [f"  left out: {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines)


def added_tokens(recorded: dict) -> dict[str, int]:
    """Token -> its id, of the tokens that the published code added to its tokenizer."""
    names = {
        "[SEG]": "seg_token_idx",
        "[SEG_SEMA]": "seg_sema_token_idx",
        "<im_start>": "im_start",
        "<im_end>": "im_end",
    }
    return {token: recorded[key] for token, key in names.items() if key in recorded}


def read_noise(file: Path) -> dict[str, float]:
    """Largest difference between two runs of the published code, by tensor; empty where there is no
    file."""
    if not file.is_file():
        return {}
    content = read_json(file)
    return {name: value["max_abs_diff"] for name, value in content["max_abs_diff"].items()} | {
        f"grad_norms.{run}": value for run, value in content.get("grad_norm_max_rel", {}).items()
    }


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Raises FileNotFoundError or ValueError naming the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; a case folder needs it")
    return read_file(file)


def read_json(file: Path) -> dict:
    """Raises FileNotFoundError or ValueError naming the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; a case folder needs it")
    return read_json_file(file.parent, file.name)

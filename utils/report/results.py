"""What an evaluation found, as data, as files and in one line: who answered, and the score of every
target."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cores.dataset.drawing import printable
from cores.dataset.files.write import write_text
from cores.utils.metrics import TargetScore, breakdown
from cores.utils.report.gallery import Picture
from cores.utils.report.tables import format_table, interval, percent
from cores.utils.report.visualize import Example

HARDLY = 0.02  # Below this share of targets with a mask, the scores tell nothing but that.
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "segment-anything", "numpy")


@dataclass
class Report:
    """What one evaluation found. All scores are fractions; ``table`` and ``line`` give percent."""

    mode: str
    """"free" or "teacher_forced"."""
    dataset: str
    """Name of the evaluation set, "SynthReason|val"."""
    texts: str
    """"first" or "all" wordings of a query."""
    summary: dict[str, Any]
    """See utils.metrics.summarise_scores."""
    scores: list[TargetScore]
    """One per target, in the order of the evaluation set, whatever the number of ranks."""
    examples: list[Example]
    seconds: float
    seed: int
    """Of the bootstrap and of the choice of pictures."""
    pictures: dict[str, list[Picture]] = field(default_factory=dict)
    """Kind of gallery -> what it shows; see utils.report.gallery."""
    masks: list[dict[str, Any]] | None = None
    """The final masks, where they are kept: entries of a list that `score` reads."""
    name: str = ""
    """Who answered: a model folder, a run, or a system whose predictions were read."""
    config: dict[str, Any] = field(default_factory=dict)
    """The settings of the program that made the report."""

    def table(self) -> str:
        return format_table({self.mode: self.summary})

    def line(self) -> str:
        """The summary in one line, in percent."""
        s = self.summary
        shown = f"gIoU {percent(s['giou'])} {interval(s['giou_ci95'])}, cIoU {percent(s['ciou'])}"
        shown += f", emission {percent(s['emission_rate'])} %"
        if s["wrong_host_rate"] is not None:
            shown += f", wrong host {percent(s['wrong_host_rate'])} %"
        if s["first_host_iou"] is not None:
            shown += f", first mask on host {percent(s['first_host_iou'])}"
        return shown + f" (n = {s['n']})"

    @property
    def warnings(self) -> list[str]:
        """What makes the scores say less than they seem to, in words."""
        found, n = [], len(self.scores)
        answered = [score for score in self.scores if score.emitted]
        empty = sum(score.target_area == 0 for score in self.scores)
        hint = ""
        if self.mode == "free":
            hint = (
                "; a model that has not learnt to say its tokens needs more steps (--epochs,"
                " --steps_per_epoch), or a --version that says them"
            )
        if not answered:
            found.append(f"no answer held a mask: all {n} targets are scored as unanswered{hint}")
        elif len(answered) <= HARDLY * n:
            found.append(f"{len(answered)} of {n} targets were answered with a mask{hint}")
        elif all(score.union - score.target_area + score.inter == 0 for score in answered):
            found.append(f"every mask that was answered is empty ({len(answered)} of {n} targets)")
        if 2 * empty > n:
            found.append(
                f"{empty} of {n} targets are empty; on these an answer without a mask scores 100"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures."""
        return {
            "unit": "fraction",
            "name": self.name,
            "mode": self.mode,
            "dataset": self.dataset,
            "texts": self.texts,
            "summary": self.summary,
            "breakdown": breakdown(self.scores, self.seed),
            "seconds": self.seconds,
            "seed": self.seed,
            "config": self.config,
            "versions": versions(),
            "targets": [dataclasses.asdict(score) for score in self.scores],
        }

    def to_json(self, path: str | Path) -> None:
        """Writes ``to_dict`` in one step: the file is never half written."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def to_csv(self, path: str | Path) -> None:
        """One row per target with the fields of TargetScore; what is not known is an empty cell."""
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(f.name for f in dataclasses.fields(TargetScore))
        for score in self.scores:
            values = dataclasses.astuple(score)
            writer.writerow(_cell(v) if isinstance(v, str) else v for v in values)
        write_text(Path(path), table.getvalue())


def _cell(text: str) -> str:
    """``text`` in one line, which no spreadsheet takes for a formula: it would run what a file name
    or a question says."""
    line = printable(text)
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a score."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found

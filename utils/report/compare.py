"""Two systems on the same targets: how large is the difference, can it be chance, and which answers
changed?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.drawing import printable
from dataset.files.errors import DataError
from dataset.files.text import read_json
from utils.metrics import TargetScore, ciou, giou, paired_bootstrap
from utils.report.tables import percent, score_text, signed, signed_interval, words

PROTOCOL = {"dataset": "data set", "texts": "wordings", "mode": "mode"}
FIELDS = {f.name: f for f in dataclasses.fields(TargetScore)}
CHECKS = {
    **dict.fromkeys(("dataset", "id", "query"), (lambda value: isinstance(value, str), "a text")),
    **dict.fromkeys(
        ("conversation", "target"),
        (lambda value: type(value) is int and value >= 0, "a whole number from 0"),
    ),
    **dict.fromkeys(
        ("inter", "union", "target_area"),
        (
            lambda value: type(value) in (int, float) and 0 <= value < float("inf"),
            "a number that is not negative",
        ),
    ),
    "iou": (
        lambda value: type(value) in (int, float) and 0 <= value <= 1,
        "a fraction from 0 to 1",
    ),
    "emitted": (lambda value: isinstance(value, bool), "true or false"),
}
REQUIRED = {f.name for f in FIELDS.values() if f.default is dataclasses.MISSING}


class NotComparable(ValueError):
    """Two reports do not answer the same questions; the message says in what they differ."""


@dataclass
class Targets:
    """What a targets-<mode>.json holds, as far as a comparison needs it."""

    path: Path
    name: str
    dataset: str
    texts: str
    mode: str
    scores: list[TargetScore]

    @property
    def by_key(self) -> dict[tuple, TargetScore]:
        return {(s.dataset, s.id, s.conversation, s.target): s for s in self.scores}

    @property
    def ciou(self) -> float:
        return ciou([s.inter for s in self.scores], [s.union for s in self.scores])

    @property
    def giou(self) -> float:
        return giou([s.iou for s in self.scores])


def read_targets(path: str | Path) -> Targets:
    """Reads a targets-<mode>.json, or the only one of a folder. Raises DataError naming file and
    field."""
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("targets-*.json"))
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise DataError(
                f"{path}: holds {len(files)} files targets-*.json ({found}); name one of them"
            )
        path = files[0]
    content = read_json(path)
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("targets"), list)
        or not content["targets"]
    ):
        raise DataError(
            f'{path}: has no list "targets"; give a targets-<mode>.json that an evaluation wrote'
        )
    for field in PROTOCOL:
        if not isinstance(content.get(field), str):
            raise DataError(
                f'{path}: has no "{field}"; give a targets-<mode>.json that an evaluation wrote'
            )
    scores = [_score(row, path, i) for i, row in enumerate(content["targets"])]
    name = content.get("name") or path.parent.name
    return Targets(path, str(name), content["dataset"], content["texts"], content["mode"], scores)


def _score(row: Any, path: Path, index: int) -> TargetScore:
    if not isinstance(row, dict) or not row.keys() >= REQUIRED:
        missing = sorted(REQUIRED - row.keys()) if isinstance(row, dict) else sorted(REQUIRED)
        raise DataError(f"{path}: targets[{index}] has no {', '.join(missing)}")
    for field, (fits, what) in CHECKS.items():
        if not fits(row[field]):
            raise DataError(f"{path}: targets[{index}].{field} is {row[field]!r}, expected {what}")
    return TargetScore(**{key: value for key, value in row.items() if key in FIELDS})


@dataclass(frozen=True)
class Change:
    """One target and its answers by both systems."""

    a: TargetScore
    b: TargetScore

    @property
    def difference(self) -> float:
        return self.b.iou - self.a.iou


@dataclass
class Comparison:
    """B against A, on the same targets. Fractions."""

    a: Targets
    b: Targets
    pairs: list[Change]
    differences: dict[str, dict[str, Any]]
    """See utils.metrics.paired_bootstrap."""
    gains: list[Change]
    """Where B is better, the largest difference first."""
    losses: list[Change]

    @property
    def counts(self) -> dict[str, int]:
        """Targets for which B is better, worse or equal."""
        found = [pair.difference for pair in self.pairs]
        return {
            "better": sum(d > 0 for d in found),
            "worse": sum(d < 0 for d in found),
            "equal": sum(d == 0 for d in found),
        }

    @property
    def images(self) -> int:
        return len({(pair.a.dataset, pair.a.id) for pair in self.pairs})

    def verdict(self, metric: str) -> str:
        """What the interval of "giou" or "ciou" lets one say."""
        low, high = self.differences[metric]["ci95"]
        if low > 0:
            return "B is better"
        return "A is better" if high < 0 else "no difference shown"

    def table(self) -> str:
        """Everything for a terminal, in percent."""
        counts = self.counts
        lines = [
            f"A  {printable(self.a.name)}  ({self.a.path})",
            f"B  {printable(self.b.name)}  ({self.b.path})",
            (
                f"{self.a.dataset}, {words(self.a.mode)}, {self.a.texts}"
                f" wording{'s' if self.a.texts == 'all' else ''}: {len(self.pairs)} pairs of"
                f" {self.images} images"
            ),
            "",
            f"{'percent':9}{'A':>7}{'B':>7}  B − A [95 % interval]",
        ]
        for metric, title in (("giou", "gIoU"), ("ciou", "cIoU")):
            entry = self.differences[metric]
            shown = f"{signed(entry['difference'])} {signed_interval(entry['ci95'])}"
            values = f"{percent(getattr(self.a, metric)):>7}{percent(getattr(self.b, metric)):>7}"
            lines.append(f"{title:9}{values}  {shown}  {self.verdict(metric)}")
        lines += [
            "",
            (
                f"B better on {counts['better']}, worse on {counts['worse']}, equal on"
                f" {counts['equal']} targets"
            ),
        ]
        for title, changes in (("gained most", self.gains), ("lost most", self.losses)):
            if changes:
                lines += ["", f"{title}:", *(_line(change) for change in changes)]
        return "\n".join(lines)


def _line(change: Change) -> str:
    a, b = change.a, change.b
    return (
        f"  {signed(change.difference):>7}  {score_text(a):>7} → {score_text(b):>7} "
        f" {printable(f'{a.place}: {a.query}')}"
    )


def compare(a: Targets, b: Targets, top: int = 10, seed: int = 0) -> Comparison:
    """Pairs the targets of two reports. Raises NotComparable, with the reason, if they are not the
    same ones."""
    for field, what in PROTOCOL.items():
        if getattr(a, field) != getattr(b, field):
            raise NotComparable(
                f"{a.path} and {b.path} cannot be compared: the {what} is {getattr(a, field)!r} in"
                f" one, {getattr(b, field)!r} in the other"
            )
    pairs = _pairs(a, b)
    ranked = sorted(pairs, key=lambda pair: pair.difference)
    return Comparison(
        a=a,
        b=b,
        pairs=pairs,
        differences=paired_bootstrap(
            [pair.a for pair in pairs], [pair.b for pair in pairs], seed=seed
        ),
        gains=[pair for pair in reversed(ranked) if pair.difference > 0][:top],
        losses=[pair for pair in ranked if pair.difference < 0][:top],
    )


def _pairs(a: Targets, b: Targets) -> list[Change]:
    """In the order of ``a``."""
    ours, theirs = a.by_key, b.by_key
    for here, there, keys in (
        (a, b, ours.keys() - theirs.keys()),
        (b, a, theirs.keys() - ours.keys()),
    ):
        if keys:
            raise NotComparable(
                f"{here.path} has {len(keys)} targets that {there.path} has not, such as"
                f" {_shown(min(keys))}; evaluate both on the whole set"
            )
    for targets, found in ((a, ours), (b, theirs)):
        if len(found) != len(targets.scores):
            raise NotComparable(f"{targets.path}: holds a target twice")
    for key, score in ours.items():
        other = theirs[key]
        for field in ("query", "target_area"):
            if getattr(score, field) != getattr(other, field):
                raise NotComparable(
                    f"{a.path} and {b.path} cannot be compared: {_shown(key)} has the"
                    f" {field.replace('_', ' ')} {getattr(score, field)!r} in one,"
                    f" {getattr(other, field)!r} in the other"
                )
    return [Change(score, theirs[key]) for key, score in ours.items()]


def _shown(key: Sequence) -> str:
    dataset, id, conversation, target = key
    return f"{dataset} {id}, conversation {conversation}, target {target}"

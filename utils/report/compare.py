"""Two systems on the same targets: how large is the difference, can it be chance, and which answers
changed?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cores.dataset.drawing import printable
from cores.dataset.files.errors import DataError
from cores.dataset.files.text import read_json
from cores.utils.metrics import TargetScore, ciou, giou, paired_bootstrap
from cores.utils.report.tables import percent, score_text, signed, signed_interval, words

# What two files must agree in to be compared: field -> its name in messages.
PROTOCOL = {"dataset": "data set", "texts": "wordings", "mode": "mode"}
# Fields of a row that older versions wrote under another name.
OLD_NAMES = {"surplus": "extra_masks"}


Key = tuple[str, str, int, int]
"""A target: data set, id of the sample, and its numbers of conversation and target."""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < float("inf")


# Fields -> (a test of their value, what it should be).
CHECKS: dict[tuple[str, ...], tuple[Callable[[Any], bool], str]] = {
    ("dataset", "id", "query"): (lambda value: isinstance(value, str), "a text"),
    ("conversation", "target"): (
        lambda value: type(value) is int and value >= 0,
        "a whole number from 0",
    ),
    ("inter", "union", "target_area"): (_is_number, "a number that is not negative"),
    ("iou",): (lambda value: _is_number(value) and value <= 1, "a fraction from 0 to 1"),
    ("emitted",): (lambda value: isinstance(value, bool), "true or false"),
}
FIELDS = {f.name for f in dataclasses.fields(TargetScore)}
REQUIRED = {f.name for f in dataclasses.fields(TargetScore) if f.default is dataclasses.MISSING}


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
    def by_key(self) -> dict[tuple[str, str, int, int], TargetScore]:
        """(data set, image, conversation, target) -> score."""
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
    expected = "give a targets-<mode>.json that an evaluation wrote"
    if not isinstance(content, dict) or not isinstance(content.get("targets"), list):
        content = {}
    if not content.get("targets"):
        raise DataError(f'{path}: has no list "targets"; {expected}')
    for field in PROTOCOL:
        if not isinstance(content.get(field), str):
            raise DataError(f'{path}: has no "{field}"; {expected}')
    scores = [_read_score(row, path, i) for i, row in enumerate(content["targets"])]
    name = content.get("name") or path.parent.name
    return Targets(path, str(name), content["dataset"], content["texts"], content["mode"], scores)


def read_pair(a: Path, b: Path, mode: str | None = None) -> tuple[Targets, Targets]:
    """The two results to compare, files or folders. Folders may hold both modes: ``mode`` chooses,
    or, without one, that of a file beside the folder, or the first of free and teacher-forced that
    all folders have. Raises DataError naming a folder that lacks it."""
    for path in (a, b):
        if not path.exists():
            read_targets(path)  # It says so.
    held = {
        path: {file.stem.removeprefix("targets-") for file in path.glob("targets-*.json")}
        for path in (a, b)
        if path.is_dir()
    }
    for path, modes in held.items():
        if not modes:
            raise DataError(
                f"{path}: holds no targets-<mode>.json; give a run of train_ds.py or the folder"
                " that an evaluation wrote"
            )
    if mode is None and held and len(held) < len({a, b}):
        mode = read_targets(b if a in held else a).mode
    wanted = [mode] if mode else ["free", "teacher_forced"]
    for name in wanted:
        if all(name in modes for modes in held.values()):
            return tuple(  # type: ignore[return-value]  # There are two.
                read_targets(path / f"targets-{name}.json" if path in held else path)
                for path in (a, b)
            )
    there = "; ".join(f"{path} has {', '.join(sorted(modes))}" for path, modes in held.items())
    raise DataError(f"no targets-{' or -'.join(wanted)}.json in both: {there}")


def _read_score(row: Any, path: Path, index: int) -> TargetScore:
    known = row if isinstance(row, dict) else {}
    known = {new: known[old] for old, new in OLD_NAMES.items() if old in known} | known
    if missing := sorted(REQUIRED - known.keys()):
        raise DataError(f"{path}: targets[{index}] has no {', '.join(missing)}")
    for fields, (fits, what) in CHECKS.items():
        for field in fields:
            if not fits(known[field]):
                raise DataError(
                    f"{path}: targets[{index}].{field} is {known[field]!r}, expected {what}"
                )
    return TargetScore(**{key: value for key, value in known.items() if key in FIELDS})


@dataclass(frozen=True)
class Change:
    """One target and its answers by both systems."""

    a: TargetScore
    b: TargetScore

    @property
    def key(self) -> Key:
        return self.a.dataset, self.a.id, self.a.conversation, self.a.target

    @property
    def difference(self) -> float:
        return self.b.iou - self.a.iou

    def line(self) -> str:
        """For a terminal, in percent."""
        where = printable(f"{self.a.place}: {self.a.query}")
        scores = f"{score_text(self.a):>7} → {score_text(self.b):>7}"
        return f"  {signed(self.difference):>7}  {scores}  {where}"


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
        a, b = self.a, self.b
        wordings = "first wording" if a.texts == "first" else f"{a.texts} wordings"
        lines = [
            f"A  {printable(a.name)}  ({a.path})",
            f"B  {printable(b.name)}  ({b.path})",
            f"{a.dataset}, {words(a.mode)}, {wordings}: {len(self.pairs)} pairs of {self.images}"
            " images",
            "",
            f"{'percent':9}{'A':>7}{'B':>7}  B − A [95 % interval]",
        ]
        for metric, title in (("giou", "gIoU"), ("ciou", "cIoU")):
            entry = self.differences[metric]
            shown = f"{signed(entry['difference'])} {signed_interval(entry['ci95'])}"
            values = "".join(f"{percent(getattr(side, metric)):>7}" for side in (a, b))
            lines.append(f"{title:9}{values}  {shown}  {self.verdict(metric)}")
        summary = "B better on {better}, worse on {worse}, equal on {equal} targets"
        lines += ["", summary.format_map(self.counts)]
        for title, changes in (("gained most", self.gains), ("lost most", self.losses)):
            if changes:
                lines += ["", f"{title}:", *(change.line() for change in changes)]
        return "\n".join(lines)


def compare_targets(a: Targets, b: Targets, top: int = 10, seed: int = 0) -> Comparison:
    """Pairs the targets of two reports. ``top``: how many of the largest gains and losses to keep;
    ``seed``: of the bootstrap. Raises NotComparable, with the reason, if the targets are not the
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
        differences=paired_bootstrap([p.a for p in pairs], [p.b for p in pairs], seed),
        gains=[pair for pair in reversed(ranked) if pair.difference > 0][:top],
        losses=[pair for pair in ranked if pair.difference < 0][:top],
    )


def _pairs(a: Targets, b: Targets) -> list[Change]:
    """The targets of both, in the order of ``a``. Raises NotComparable."""
    in_a, in_b = a.by_key, b.by_key
    for here, there, keys in ((a, b, in_a.keys() - in_b.keys()), (b, a, in_b.keys() - in_a.keys())):
        if keys:
            raise NotComparable(
                f"{here.path} has {len(keys)} targets that {there.path} has not, such as"
                f" {_key_text(min(keys))}; evaluate both on the whole set"
            )
    for targets, found in ((a, in_a), (b, in_b)):
        if len(found) != len(targets.scores):
            raise NotComparable(f"{targets.path}: holds a target twice")
    pairs = [Change(score, in_b[key]) for key, score in in_a.items()]
    for key, pair in zip(in_a, pairs, strict=True):
        for field in ("query", "target_area"):
            one, other = getattr(pair.a, field), getattr(pair.b, field)
            if one != other:
                raise NotComparable(
                    f"{a.path} and {b.path} cannot be compared: {_key_text(key)} has the"
                    f" {field.replace('_', ' ')} {one!r} in one, {other!r} in the other"
                )
    return pairs


def _key_text(key: tuple[str, str, int, int]) -> str:
    dataset, id, conversation, target = key
    return f"{dataset} {id}, conversation {conversation}, target {target}"

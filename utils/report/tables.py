"""How scores are written for people: in percent, with their intervals, in the same columns
everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cores.utils.metrics import TargetScore


def percent(value: float | None) -> str:
    """A fraction in percent with one digit; "–" for what is not known."""
    return "–" if value is None else f"{100 * value:.1f}"


def interval(pair: Sequence[float]) -> str:
    """Two fractions in percent: "[31.2, 40.5]"."""
    return f"[{100 * pair[0]:.1f}, {100 * pair[1]:.1f}]"


def score_text(score: TargetScore) -> str:
    """The IoU of one answer in percent, or that there was no mask."""
    return percent(score.iou) if score.emitted else "no mask"


def signed(difference: float) -> str:
    """A difference of fractions in percentage points, always with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def signed_interval(pair: Sequence[float]) -> str:
    return f"[{signed(pair[0])}, {signed(pair[1])}]"


def words(name: str) -> str:
    """A name of the code as people write it: "teacher_forced" -> "teacher forced"."""
    return name.replace("_", " ")


# Title of a column -> its cell, from a summary of utils.metrics or utils.evaluation.baselines.
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "gIoU": lambda s: f"{percent(s['giou'])} {interval(s['giou_ci95'])}",
    "cIoU": lambda s: f"{percent(s['ciou'])} {interval(s['ciou_ci95'])}",
    "short": lambda s: percent(s.get("giou_short")),
    "long": lambda s: percent(s.get("giou_long")),
    "emission": lambda s: percent(s.get("emission_rate")),
    "wrong host": lambda s: percent(s.get("wrong_host_rate")),
    "1st mask on host": lambda s: percent(s.get("first_host_iou")),
    "n": lambda s: str(s["n"]),
}


def columns(rows: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Title -> one cell per row; ``rows``: name -> a summary of utils.metrics or
    utils.evaluation.baselines.

    A column that no row fills is left out.
    """
    cells = {title: [show(summary) for summary in rows.values()] for title, show in COLUMNS.items()}
    return {title: column for title, column in cells.items() if any(cell != "–" for cell in column)}


def format_table(rows: dict[str, dict[str, Any]]) -> str:
    """A text table of ``columns`` in percent with 95 % intervals."""
    names = ["", *(words(name) for name in rows)]
    width = max(map(len, names))
    lines = [name.ljust(width) for name in names]
    for title, cells in columns(rows).items():
        width = max(map(len, (title, *cells)))
        lines = [
            f"{line}  {cell.rjust(width)}"
            for line, cell in zip(lines, (title, *cells), strict=True)
        ]
    lines.insert(1, "─" * len(lines[0]))
    return "\n".join(lines)

"""How scores are written for people: in percent, with their intervals, in the same columns
everywhere."""

from __future__ import annotations

from typing import Any

from utils.metrics import TargetScore


def percent(value: float | None) -> str:
    """A fraction in percent with one digit; "–" for what is not known."""
    return "–" if value is None else f"{100 * value:.1f}"


def interval(pair: list[float]) -> str:
    return f"[{100 * pair[0]:.1f}, {100 * pair[1]:.1f}]"


def score_text(score: TargetScore) -> str:
    """The IoU of one answer in percent, or that there was no mask."""
    return percent(score.iou) if score.emitted else "no mask"


def signed(difference: float) -> str:
    """A difference of fractions in percentage points, always with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def signed_interval(pair: list[float]) -> str:
    return f"[{signed(pair[0])}, {signed(pair[1])}]"


def words(name: str) -> str:
    """ "teacher_forced" as people write it."""
    return name.replace("_", " ")


COLUMNS = {
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
    cells = columns(rows)
    names = [words(name) for name in rows]
    width = max(map(len, names))
    widths = {title: max(len(title), *map(len, column)) for title, column in cells.items()}
    lines = [" " * width + "  " + "  ".join(title.rjust(widths[title]) for title in cells)]
    lines.append("─" * len(lines[0]))
    for i, name in enumerate(names):
        lines.append(
            name.ljust(width)
            + "  "
            + "  ".join(cells[title][i].rjust(widths[title]) for title in cells)
        )
    return "\n".join(lines)

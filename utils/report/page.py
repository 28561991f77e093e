"""The report of an evaluation, and the comparison of two, as one HTML file that opens offline:
numbers, charts and the answers behind them.

It loads nothing (pictures are inside) and runs nothing (there is no script), so it can be mailed
and kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cores.dataset.drawing import HIT_COLOUR, MISSED_COLOUR, WRONG_COLOUR
from cores.utils.metrics import breakdown
from cores.utils.report.compare import Comparison, Key
from cores.utils.report.html import render
from cores.utils.report.results import Report
from cores.utils.report.tables import columns, percent

BINS = 20  # bars of a histogram
MOST_ROWS = 200  # of the answers without a mask; the CSV has them all
MOST_TARGETS = 1000  # of the table of all; likewise
LEGEND = {"hit": HIT_COLOUR, "wrong": WRONG_COLOUR, "missed": MISSED_COLOUR}
CURVES = {"Loss of the steps": ("train", "loss"), "gIoU of the validations": ("val", "giou")}


def evaluation_page(
    reports: Sequence[Report],
    baselines: dict[str, dict[str, Any]],
    versions: dict[str, str],
    log: Sequence[dict[str, Any]] = (),
) -> str:
    """The whole document. ``reports``: one per mode, of one data set; ``baselines``: name ->
    summary, see utils.evaluation.baselines; ``versions``: package -> version; ``log``: rows of the
    training, see utils.training.log."""
    first = reports[0]
    summaries = {report.mode: report.summary for report in reports} | baselines
    return render(
        "evaluation.html.j2",
        title=f"{first.name or 'Evaluation'} on {first.dataset}",
        images=len({(score.dataset, score.id) for score in first.scores}),
        summaries=summaries,
        columns=columns(summaries),
        modes=[_mode(report) for report in reports],
        edges=[f"{100 * i // BINS}" if i % 4 == 0 else "" for i in range(BINS + 1)],
        most_rows=MOST_ROWS,
        most_targets=MOST_TARGETS,
        legend=LEGEND,
        curves=_curves(log),
        settings={"Settings": first.config, "Versions": versions},
    )


def _mode(report: Report) -> dict[str, Any]:
    """What the page shows of one mode."""
    groups = breakdown(report.scores, report.seed)
    without_mask = [score for score in report.scores if not score.emitted]
    return {
        "report": report,
        "counts": _histogram(score.iou for score in report.scores),
        "alarms": _histogram(score.iou for score in without_mask),
        "chain": _chain(report),
        "by_query": groups["query_length"] | groups["query_kind"],
        "by_size": groups["target_size"],
        "without_mask": without_mask,
        "ranked": sorted(report.scores, key=lambda score: score.iou),
    }


def _curves(log: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Title -> points in the unit square and the ends of both axes, of what the log has twice."""
    found = {}
    for title, (kind, name) in CURVES.items():
        rows = [row for row in log if row["kind"] == kind and isinstance(row.get(name), float)]
        if len(rows) < 2:
            continue
        last, top = max(row["step"] for row in rows), max(row[name] for row in rows) or 1.0
        points = [(row["step"] / max(last, 1), row[name] / top) for row in rows]
        shown = percent(top) if kind == "val" else f"{top:.3g}"
        found[title] = {"points": points, "last": last, "top": shown}
    return found


def _histogram(shares: Iterable[float]) -> list[int]:
    """How many of ``shares``, each in [0, 1], fall into each of the BINS."""
    bins = [min(int(share * BINS), BINS - 1) for share in shares]
    return np.bincount(np.array(bins, dtype=int), minlength=BINS).tolist()


def _chain(report: Report) -> dict[str, str]:
    """What the steps of the chain did, row by row; nothing where there is one level only."""
    s = report.summary
    pairs = [(x.first_iou, x.iou) for x in report.scores if x.first_iou is not None]
    if not pairs:
        return {}
    better = float(np.mean([last > first for first, last in pairs]))
    rows = {
        "first mask with the target, mean IoU": percent(s["first_iou"]),
        "last mask with the target, mean IoU": percent(float(np.mean([last for _, last in pairs]))),
        "last better than first": f"{percent(better)} %",
    }
    if s["first_host_iou"] is not None:
        rows["first mask with the object that holds the target"] = percent(s["first_host_iou"])
    if s["wrong_host_rate"] is not None:
        rows["last mask mostly on another object"] = f"{percent(s['wrong_host_rate'])} %"
    return rows | {"masks nobody asked for, per target": f"{s['extra_masks_rate']:.2f}"}


def comparison_page(
    found: Comparison, pictures: dict[Key, list[tuple[str, bytes]]] | None = None, why: str = ""
) -> str:
    """Two systems on the same targets as one page. ``pictures``: target -> (caption, JPEG) of it,
    see utils.evaluation.pictures; ``why``: what is missing where there are none."""
    entries = found.differences.values()
    ends = [abs(end) for entry in entries for end in (*entry["ci95"], entry["difference"])]
    bars = _histogram((p.difference + 1) / 2 for p in found.pairs if p.difference != 0)
    edges = ["−100", "−50", "0", "+50", "+100"]
    return render(
        "comparison.html.j2",
        pictures=pictures or {},
        why=why,
        legend=LEGEND,
        title=f"{found.b.name} against {found.a.name} on {found.a.dataset}",
        found=found,
        span=max(1.1 * max(ends), 0.01),
        points=[(pair.a.iou, pair.b.iou) for pair in found.pairs],
        bars=bars,
        worse=bars[: BINS // 2] + [0] * (BINS - BINS // 2),
        edges=[edges[i * 4 // BINS] if i * 4 % BINS == 0 else "" for i in range(BINS + 1)],
    )

"""The report of an evaluation as one HTML file that opens offline: numbers, charts and the answers
behind them.

It loads nothing (pictures are inside) and runs nothing (there is no script), so it can be mailed
and kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from utils.metrics import TargetScore, breakdown
from utils.report.compare import Change, Comparison
from utils.report.gallery import Picture
from utils.report.html import (
    Markup,
    histogram,
    interval_bar,
    join,
    page,
    picture,
    scatter,
    table,
    tag,
    text,
)
from utils.report.results import Report
from utils.report.tables import (
    columns,
    interval,
    percent,
    score_text,
    signed,
    signed_interval,
    words,
)

BINS = 20
MOST_FAILURES = 200  # rows; the CSV has them all
MODES = {
    "free": (
        "The model answered by itself. A target for which it gave no mask scores 0, or 1 where"
        " nothing was meant."
    ),
    "teacher_forced": (
        "The published protocol: the answer with its special tokens stood in the prompt, so only"
        " the masks are tested. Not comparable with free generation."
    ),
}
KINDS = {
    "worst": "Lowest IoU among the answers that held a mask.",
    "random": "Drawn at random, the same ones for the same seed.",
    "best": "Highest IoU.",
    "silent": "Some of the answers that held no mask for a target.",
}
TITLES = {
    "worst": "Worst answers",
    "random": "Random answers",
    "best": "Best answers",
    "silent": "Answers without a mask",
}


def evaluation_page(
    reports: Sequence[Report], baselines: dict[str, dict[str, Any]], versions: dict[str, str]
) -> str:
    """The whole document. ``reports``: one per mode, of one data set; ``baselines``: name ->
    summary, see utils.evaluation.baselines."""
    first = reports[0]
    title = f"{first.name or 'Evaluation'} on {first.dataset}"
    wording = {"first": "the first wording of every query", "all": "every wording of every query"}[
        first.texts
    ]
    images = len({(score.dataset, score.id) for score in first.scores})
    facts = f"{first.summary['n']} targets of {images} images · {wording} · seed {first.seed} · "
    facts += ", ".join(f"{words(report.mode)} in {_duration(report.seconds)}" for report in reports)
    summaries = {report.mode: report.summary for report in reports}
    return page(
        title,
        tag("h1", title),
        tag("p", facts, class_="faint"),
        _cards(first),
        _summary_table(summaries | baselines),
        *(_mode(report) for report in reports),
        tag("h2", "How this was measured"),
        tag("p", _METHOD),
        _settings(first.config, versions),
    )


_METHOD = (
    "gIoU is the mean IoU of all targets, cIoU the sum of all intersections over the sum of all"
    " unions. Pixels marked as ignored count in neither. Intervals are 95 % bootstrap intervals"
    " over images: the targets of one image are drawn together."
)


def comparison_page(found: Comparison) -> str:
    """Two systems on the same targets as one page."""
    title = f"{found.b.name} against {found.a.name} on {found.a.dataset}"
    counts = found.counts
    facts = f"{words(found.a.mode)} · {len(found.pairs)} pairs of {found.images} images"
    widest = max(
        abs(end)
        for entry in found.differences.values()
        for end in (*entry["ci95"], entry["difference"])
    )
    span = max(1.1 * widest, 0.01)
    rows = []
    for metric, name in (("giou", "gIoU"), ("ciou", "cIoU")):
        entry = found.differences[metric]
        value, pair = entry["difference"], entry["ci95"]
        shown = [percent(getattr(side, metric)) for side in (found.a, found.b)]
        bar = interval_bar(value, pair, -span, span)
        rows.append(
            [name, *shown, signed(value), signed_interval(pair), bar, found.verdict(metric)]
        )
    points = [(pair.a.iou, pair.b.iou) for pair in found.pairs]
    return page(
        title,
        tag("h1", title),
        tag("p", facts, class_="faint"),
        table(
            [
                "percent",
                "A",
                "B",
                "B − A",
                "95 % interval",
                f"−{100 * span:.1f} to +{100 * span:.1f}",
                "",
            ],
            rows,
        ),
        tag(
            "p",
            f"A is {found.a.name}, {found.a.path}. B is {found.b.name}, {found.b.path}.",
            class_="faint small",
        ),
        tag("p", _PAIRED, class_="faint small"),
        tag("h2", "Every target"),
        tag(
            "p",
            f"B is better on {counts['better']}, worse on {counts['worse']}, equal on"
            f" {counts['equal']} targets.",
        ),
        tag(
            "div",
            scatter(points, "IoU of A in percent", "IoU of B in percent"),
            _difference_histogram(found),
            class_="columns",
        ),
        tag("h2", "Changed most"),
        tag("h3", "Better with B"),
        _changes(found.gains),
        tag("h3", "Worse with B"),
        _changes(found.losses),
    )


_PAIRED = (
    "The interval is a paired 95 % bootstrap over images: both systems are drawn on the same"
    " images. An interval that holds 0 shows no difference; it does not show that there is none."
)


def _difference_histogram(found: Comparison) -> Markup:
    bins = [
        min(int((pair.difference + 1) / 2 * BINS), BINS - 1)
        for pair in found.pairs
        if pair.difference != 0
    ]
    counts = np.bincount(bins, minlength=BINS).tolist()
    worse = [count if i < BINS // 2 else 0 for i, count in enumerate(counts)]
    edges = ["−100", "−50", "0", "+50", "+100"]
    edges = [edges[i * 4 // BINS] if i * 4 % BINS == 0 else "" for i in range(BINS + 1)]
    chart = histogram(counts, worse, edges, "histogram of the differences")
    note = (
        f"Targets by difference in IoU, B − A, in percentage points. The {found.counts['equal']}"
        " equal ones are left out."
    )
    return tag("div", chart, tag("p", note, class_="faint small"))


def _changes(changes: Sequence[Change]) -> Markup:
    if not changes:
        return tag("p", "None.", class_="faint")
    rows = [
        [
            change.a.place,
            tag(
                "span",
                signed(change.difference),
                class_="better" if change.difference > 0 else "worse",
            ),
            *(score_text(score) for score in (change.a, change.b)),
            change.a.query,
        ]
        for change in changes
    ]
    return table(["sample", "B − A", "A", "B", "question"], rows, texts=(0, 4))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _cards(report: Report) -> Markup:
    s = report.summary
    shown = [
        ("gIoU", percent(s["giou"]), interval(s["giou_ci95"])),
        ("cIoU", percent(s["ciou"]), interval(s["ciou_ci95"])),
        (
            "answered with a mask",
            f"{percent(s['emission_rate'])} %",
            f"{sum(not x.emitted for x in report.scores)} without",
        ),
    ]
    if s["wrong_host_rate"] is not None:
        shown.append(
            ("on the wrong object", f"{percent(s['wrong_host_rate'])} %", "of the non-empty masks")
        )
    cards = [
        tag(
            "div",
            tag("span", f"{label}, {words(report.mode)}", class_="faint small"),
            tag("b", value),
            tag("span", below, class_="faint small"),
            class_="card",
        )
        for label, value, below in shown
    ]
    return tag("div", *cards, class_="cards")


def _summary_table(rows: dict[str, dict[str, Any]]) -> Markup:
    cells = columns(rows)
    header = ["percent, [95 % interval]", "gIoU, 0 to 100", *cells]
    bars = [interval_bar(s["giou"], s["giou_ci95"]) for s in rows.values()]
    lines = [
        [words(name), bars[i], *(column[i] for column in cells.values())]
        for i, name in enumerate(rows)
    ]
    return table(header, lines)


def _mode(report: Report) -> Markup:
    groups = breakdown(report.scores, report.seed)
    parts = [
        tag(
            "h2", words(report.mode).capitalize() + (" generation" if report.mode == "free" else "")
        ),
        tag("p", MODES[report.mode], class_="faint"),
        tag(
            "div",
            tag(
                "div",
                tag("h3", "IoU of the targets"),
                _iou_histogram(report.scores),
                _legend(report.scores),
            ),
            tag("div", *_chain(report)),
            class_="columns",
        ),
        tag(
            "div",
            tag(
                "div",
                tag("h3", "By length of the question"),
                _groups(groups["query_length"] | groups["query_kind"]),
            ),
            tag("div", tag("h3", "By size of the target"), _groups(groups["target_size"])),
            class_="columns",
        ),
    ]
    parts += [_gallery(kind, pictures) for kind, pictures in report.pictures.items()]
    return join([*parts, _failures(report.scores)])


def _groups(rows: dict[str, dict[str, Any]]) -> Markup:
    if not rows:
        return tag("p", "Not known for these data.", class_="faint")
    lines = []
    for name, row in rows.items():
        value, pair = row["giou"], row["giou_ci95"]
        lines.append([name, row["n"], percent(value), interval(pair), interval_bar(value, pair)])
    return table(["", "n", "gIoU", "95 %", ""], lines)


def _iou_histogram(scores: Sequence[TargetScore]) -> Markup:
    bins = [min(int(score.iou * BINS), BINS - 1) for score in scores]
    counts = np.bincount(bins, minlength=BINS).tolist()
    silent = np.bincount(
        [b for b, s in zip(bins, scores, strict=True) if not s.emitted], minlength=BINS
    ).tolist()
    edges = [f"{100 * i // BINS}" if i % 4 == 0 else "" for i in range(BINS + 1)]
    return histogram(counts, silent, edges, "histogram of the IoU in percent")


def _legend(scores: Sequence[TargetScore]) -> Markup:
    silent = sum(not score.emitted for score in scores)
    note = f" Red: the {silent} without a mask." if silent else ""
    return tag("p", "Number of targets by IoU in percent." + note, class_="faint small")


def _chain(report: Report) -> list[Markup]:
    """What the steps of the chain did, where there are several."""
    s = report.summary
    if s["first_iou"] is None:
        return []
    both = [x for x in report.scores if x.first_iou is not None]
    better = sum(x.iou > x.first_iou for x in both) / len(both)
    rows = [
        ["first mask with the target, mean IoU", percent(s["first_iou"])],
        ["last mask with the target, mean IoU", percent(float(np.mean([x.iou for x in both])))],
        ["last better than first", f"{percent(better)} %"],
    ]
    if s["first_host_iou"] is not None:
        rows.append(
            ["first mask with the object that holds the target", percent(s["first_host_iou"])]
        )
    if s["wrong_host_rate"] is not None:
        rows.append(["last mask mostly on another object", f"{percent(s['wrong_host_rate'])} %"])
    rows.append(["masks nobody asked for, per target", f"{s['surplus_rate']:.2f}"])
    return [
        tag("h3", "The chain, coarse to fine"),
        table(["of the answers with a mask", ""], rows),
        tag(
            "p",
            "The first mask need not be the target: it is the place to look at.",
            class_="faint small",
        ),
    ]


def _gallery(kind: str, pictures: Sequence[Picture]) -> Markup:
    cards = tag("div", *(_answer(shown) for shown in pictures), class_="gallery")
    return join([tag("h3", TITLES[kind]), tag("p", KINDS[kind], class_="faint small"), cards])


def _answer(shown: Picture) -> Markup:
    score = shown.score
    value = f"IoU {score_text(score)}" if score.emitted else score_text(score)
    figures = [
        tag("figure", picture(jpeg, caption), tag("figcaption", caption, title=caption))
        for caption, jpeg in shown.tiles
    ]
    said = [tag("div", f"Answer: {score.answer}", class_="small")] if score.answer else []
    return tag(
        "article",
        tag(
            "div",
            tag("span", score.query, class_="query"),
            tag("span", value, class_="score"),
            class_="head",
        ),
        tag("div", *figures, class_="tiles"),
        *said,
        tag("div", f"{score.dataset} · {score.place}", class_="faint small"),
        class_="answer",
    )


def _failures(scores: Sequence[TargetScore]) -> Markup:
    """The list of answers without a mask."""
    silent = [score for score in scores if not score.emitted]
    if not silent:
        return Markup()
    rows = [
        [score.place, score.query, score.answer or "(nothing)"] for score in silent[:MOST_FAILURES]
    ]
    head = (
        f"All {len(silent)} targets without a mask"
        if len(silent) == len(rows)
        else f"{len(rows)} of {len(silent)} without a mask"
    )
    return tag(
        "details",
        tag("summary", head),
        table(["sample", "question", "answer"], rows, texts=(0, 1, 2)),
    )


def _settings(config: dict[str, Any], versions: dict[str, str]) -> Markup:
    blocks = {"Settings": config, "Versions": versions}
    return join(
        tag("details", tag("summary", name), _lines(values))
        for name, values in blocks.items()
        if values
    )


def _lines(values: dict[str, Any]) -> Markup:
    return tag(
        "pre",
        Markup("\n".join(text(f"{key}: {json.dumps(value)}") for key, value in values.items())),
    )

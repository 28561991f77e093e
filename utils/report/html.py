"""HTML without a template language: everything that is not Markup is escaped, so no text of a data
set can become markup."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from dataset.drawing import printable

VOID = {"img", "meta", "line", "rect", "circle", "br"}

STYLE = """
:root { color-scheme: light dark; --ink: #16191f; --faint: #616a76; --paper: #fff; --card: #f6f7f9; --line: #dfe3e8;
  --bar: #3268c8; --soft: #b9cdf1; --alarm: #d3305f; --good: #178a52; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --faint: #9aa3af; --paper: #14171c; --card: #1d2128;
  --line: #333a44; --bar: #7ba4f0; --soft: #34507f; --alarm: #f2668f; --good: #4cc38a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 28px 24px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 6px; padding-top: 18px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 26px 0 8px; }
p { margin: 4px 0 10px; max-width: 78ch; }
.faint { color: var(--faint); }
.small { font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px 5px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--faint); font-size: 13px; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; min-width: 16em; overflow-wrap: anywhere; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 18px; min-width: 150px; }
.card b { display: block; font-size: 26px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 8px 40px; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 540px), 1fr)); gap: 16px; }
.answer { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; margin: 0; }
.tiles { display: flex; gap: 8px; margin: 8px 0; }
.tiles figure { margin: 0; flex: 1 1 0; min-width: 0; }
.tiles img { display: block; width: 100%; height: auto; border-radius: 4px; }
.tiles figcaption { font-size: 12px; color: var(--faint); white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.query { font-weight: 600; overflow-wrap: anywhere; }
.head { display: flex; justify-content: space-between; gap: 12px; }
.score { font-variant-numeric: tabular-nums; white-space: nowrap; }
.better { color: var(--good); } .worse { color: var(--alarm); }
svg { display: block; max-width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 12px; }
svg .axis { stroke: var(--line); } svg .bar { fill: var(--bar); } svg .alarm { fill: var(--alarm); }
svg .range { stroke: var(--bar); stroke-width: 2; } svg .dot { fill: var(--bar); }
svg .cloud { fill: var(--bar); fill-opacity: .45; }
td svg { display: inline-block; vertical-align: middle; max-width: none; }
details { margin: 10px 0; } summary { cursor: pointer; font-weight: 600; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px; overflow-x: auto;
  font-size: 12px; }
@media print { details { display: none; } .answer { break-inside: avoid; } }
"""


class Markup(str):
    """Text that is HTML already."""


def text(content: object) -> Markup:
    """Any text as HTML, in one line and without control characters."""
    return content if isinstance(content, Markup) else Markup(escape(printable(str(content))))


def join(parts: Iterable[object]) -> Markup:
    return Markup("".join(text(part) for part in parts))


def tag(name: str, /, *content: object, **attributes: object) -> Markup:
    """An element; ``class_`` stands for class, ``stroke_width`` for stroke-width."""
    inside = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items()
    )
    if name in VOID:
        return Markup(
            f"<{name}{inside}>" if name in ("img", "meta", "br") else f"<{name}{inside}/>"
        )
    return Markup(f"<{name}{inside}>{join(content)}</{name}>")


def picture(jpeg: bytes, alt: str) -> Markup:
    return tag(
        "img",
        src="data:image/jpeg;base64," + base64.b64encode(jpeg).decode(),
        alt=alt,
        loading="lazy",
    )


def table(
    header: Sequence[object], rows: Iterable[Sequence[object]], texts: Sequence[int] = (0,)
) -> Markup:
    """``texts``: the columns that hold sentences, which are left aligned and may wrap."""

    def line(cell: str, cells: Sequence[object]) -> Markup:
        return tag(
            "tr",
            *(
                tag(cell, c, class_="text") if i in texts and i else tag(cell, c)
                for i, c in enumerate(cells)
            ),
        )

    body = tag("tbody", *(line("td", row) for row in rows))
    return tag("div", tag("table", tag("thead", line("th", header)), body), class_="scroll")


def page(title: str, *content: object) -> str:
    """A whole document that loads nothing, not even when its text tried to: the policy forbids
    it."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", *content), lang="en") + "\n"


# ------------------------------------------------------------------------------------------- charts


def _svg(width: int, height: int, label: str, *content: object) -> Markup:
    return tag(
        "svg",
        *content,
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label=label,
    )


def interval_bar(
    value: float, pair: Sequence[float], low: float = 0.0, high: float = 1.0
) -> Markup:
    """A dot with its interval on a line from ``low`` to ``high``; with a mark at 0 where that lies
    inside."""
    width, height, edge = 190, 18, 6

    def x(number: float) -> float:
        return round(edge + (width - 2 * edge) * (number - low) / (high - low), 1)

    zero = (
        [tag("line", x1=x(0), x2=x(0), y1=1, y2=height - 1, class_="axis", stroke_width=2)]
        if low < 0 < high
        else []
    )
    return _svg(
        width,
        height,
        f"{100 * value:.1f}, from {100 * pair[0]:.1f} to {100 * pair[1]:.1f}",
        tag("line", x1=x(low), x2=x(high), y1=height / 2, y2=height / 2, class_="axis"),
        *zero,
        tag("line", x1=x(pair[0]), x2=x(pair[1]), y1=height / 2, y2=height / 2, class_="range"),
        tag("circle", cx=x(value), cy=height / 2, r=4, class_="dot"),
    )


def histogram(
    counts: Sequence[int], alarms: Sequence[int], edges: Sequence[str], label: str
) -> Markup:
    """Bars of ``counts``, with the ``alarms`` among them in another colour at the foot.

    ``edges``: one more than bars; an empty text leaves a tick without a number.
    """
    width, height, left, right, bottom, top = 560, 220, 44, 18, 28, 18
    most = max(1, *counts)
    step = (width - left - right) / len(counts)
    room = height - bottom - top
    parts: list[Markup] = []
    for share in (0, 0.5, 1):
        y = round(top + room * (1 - share), 1)
        parts.append(tag("line", x1=left, x2=width - right, y1=y, y2=y, class_="axis"))
        if share * most == round(share * most):
            parts.append(tag("text", round(share * most), x=left - 8, y=y + 4, text_anchor="end"))
    for i, (count, alarm) in enumerate(zip(counts, alarms, strict=True)):
        x, full, part = left + i * step + 1, room * count / most, room * alarm / most
        if count:
            title = tag("title", f"{edges[i] or ''} {count}".strip())
            place = {"x": round(x, 1), "width": round(step - 2, 1)}
            upper = tag(
                "rect",
                **place,
                y=round(top + room - full, 1),
                height=round(full - part, 1),
                class_="bar",
            )
            lower = tag(
                "rect",
                **place,
                y=round(top + room - part, 1),
                height=round(part, 1),
                class_="alarm",
            )
            parts.append(tag("g", title, upper, lower))
    for i, edge in enumerate(edges):
        if edge:
            parts.append(
                tag("text", edge, x=round(left + i * step, 1), y=height - 8, text_anchor="middle")
            )
    return _svg(width, height, label, *parts)


def scatter(points: Sequence[tuple[float, float]], across: str, up: str) -> Markup:
    """Points in the unit square with its diagonal; ``across`` and ``up`` name the axes."""
    side, left, top = 360, 44, 12
    room = side - left - top

    def place(x: float, y: float) -> tuple[float, float]:
        return round(left + room * x, 1), round(top + room * (1 - y), 1)

    parts = []
    for tick in (0.0, 0.5, 1.0):
        (x0, y0), (x1, y1) = place(0, tick), place(1, tick)
        parts.append(tag("line", x1=x0, x2=x1, y1=y0, y2=y1, class_="axis"))
        parts.append(tag("text", f"{100 * tick:.0f}", x=left - 8, y=y0 + 4, text_anchor="end"))
        (x0, y0), (x1, y1) = place(tick, 0), place(tick, 1)
        parts.append(tag("line", x1=x0, x2=x1, y1=y0, y2=y1, class_="axis"))
        parts.append(tag("text", f"{100 * tick:.0f}", x=x0, y=y0 + 16, text_anchor="middle"))
    (x0, y0), (x1, y1) = place(0, 0), place(1, 1)
    parts.append(tag("line", x1=x0, x2=x1, y1=y0, y2=y1, class_="axis", stroke_width=2))
    for x, y in (place(*point) for point in points):
        parts.append(tag("circle", cx=x, cy=y, r=3.5, class_="cloud"))
    parts.append(tag("text", across, x=left + room / 2, y=side - 8, text_anchor="middle"))
    middle = top + room / 2
    parts.append(
        tag("text", up, x=12, y=middle, text_anchor="middle", transform=f"rotate(-90 12 {middle})")
    )
    return _svg(side, side, f"{up} over {across}", *parts)

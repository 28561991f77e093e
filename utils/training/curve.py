"""Draws the curves of runs from their log.jsonl: losses of the steps, scores of the validations.

    python -m utils.curve runs/demo                                   # runs/demo/curve.png
    python -m utils.curve runs/cores runs/lisa --out both.png         # several runs in one picture
    python -m utils.curve runs/demo --loss text,bce,dice --score giou,ciou

Each of several runs has a colour, and each value in a panel a line style. Steps that --spike_factor
reported are marked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.backend_bases import FigureCanvasBase  # noqa: E402

from cores.dataset import command  # noqa: E402
from cores.dataset.files.write import prepare_output, writing  # noqa: E402
from cores.utils.settings.flags import UsageError  # noqa: E402
from cores.utils.settings.programs import read_curve  # noqa: E402
from cores.utils.training.log import read_log  # noqa: E402

STYLES = ("-", "--", ":", "-.")
Log = list[dict[str, Any]]


def read_run(run: Path) -> Log:
    """The rows of a run folder's log, or of a log file. Raises UsageError if there are none."""
    path = run / "log.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise UsageError(f"{path}: not found; give run folders that train_ds.py wrote")
    rows = read_log(path)
    if not rows:
        raise UsageError(f"{path}: has no rows yet; the first comes after --print_freq steps")
    return rows


def series(rows: Log, kind: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of ``name`` in the rows of ``kind``, "train" or "val"."""
    found = [
        (row["step"], row[name])
        for row in rows
        if row["kind"] == kind and isinstance(row.get(name), (int, float))
    ]
    return [step for step, _ in found], [value for _, value in found]


def refuse_unknown(logs: dict[str, Log], kind: str, names: Sequence[str]) -> None:
    """Raises UsageError if one of ``names`` is in no row of ``kind``, unless there are none yet."""
    values = (
        item for rows in logs.values() for r in rows if r["kind"] == kind for item in r.items()
    )
    known = {name for name, value in values if isinstance(value, (int, float))} - {"step", "epoch"}
    for name in names:
        if known and name not in known:
            raise UsageError(
                f"{name!r} is in no {kind} row of these runs; choose from"
                f" {', '.join(sorted(known))}"
            )


def draw(logs: dict[str, Log], losses: Sequence[str], scores: Sequence[str], out: Path) -> None:
    """Writes a PNG: ``losses`` of the train rows on the left, ``scores`` of the val rows in percent
    on the right.

    ``logs``: name of a run -> its rows. Raises UsageError for a name that no run has.
    """
    refuse_unknown(logs, "train", losses)
    refuse_unknown(logs, "val", scores)
    validated = any(row["kind"] == "val" for rows in logs.values() for row in rows)
    columns = 1 + validated
    size = (4.8 * columns, 3.4)
    figure, axes = pyplot.subplots(1, columns, figsize=size, squeeze=False, layout="constrained")
    _panel(axes[0, 0], logs, "train", losses, 1, "loss")
    if validated:
        _panel(axes[0, 1], logs, "val", scores, 100, "validation, percent")
    try:
        with writing(out) as partial:
            figure.savefig(partial, dpi=100, format=out.suffix[1:] or "png")
    finally:
        pyplot.close(figure)


def _panel(
    axis, logs: dict[str, Log], kind: str, names: Sequence[str], scale: float, title: str
) -> None:
    for colour, (run, rows) in enumerate(logs.items()):
        for number, name in enumerate(names):
            steps, values = series(rows, kind, name)
            several = len(logs) > 1
            axis.plot(
                steps,
                [scale * value for value in values],
                label=f"{run}, {name}" if several else name,
                color=f"C{colour if several else number}",
                linestyle=STYLES[number % len(STYLES)],
                marker="o" if kind == "val" else None,
                markersize=4,
            )
        if kind == "train":
            # Only rows of spikes have the median of the losses before them.
            spikes = [row for row in rows if "median" in row and names[0] in row]
            steps = [row["step"] for row in spikes]
            axis.plot(steps, [row[names[0]] for row in spikes], "x", color=f"C{colour}")
    axis.set(title=title, xlabel="step", ylim=(0, None), xlim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def names_of(runs: Sequence[Path]) -> list[str]:
    """The runs' folder names, or their whole paths if two folders have the same name."""
    short = [run.resolve().name if run.is_dir() else run.resolve().parent.name for run in runs]
    return short if len(set(short)) == len(short) else [str(run) for run in runs]


@command.entry()
def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 for a mistake."""
    args = read_curve(argv)
    prepare_output("--out", args.out)
    logs = dict(zip(names_of(args.runs), map(read_run, args.runs), strict=True))
    first = args.runs[0]
    out = args.out or (first if first.is_dir() else first.parent) / "curve.png"
    known = FigureCanvasBase.get_supported_filetypes()
    if out.suffix[1:] not in known and out.suffix:
        raise UsageError(f"--out {out}: its name has to end like one of {', '.join(sorted(known))}")
    draw(logs, args.loss.split(","), args.score.split(","), out)
    print(out)
    return 0

"""CoReS against LISA, and LLM-Seg, on SynthReason, with several seeds.

    python -m benchmarks.synthreason                    # 5 seeds × 2 methods, half an hour, 2 cores
    python -m benchmarks.synthreason --methods llm_seg  # adds rows; see docs/llm_seg.md before
    python -m benchmarks.synthreason --table            # prints benchmarks/results/synthreason.json

Methods start from the same pre-trained parts and have the same data, order, steps and learning
rate. Each run is ``train_ds.py --config configs/tiny.yaml --method M --seed S``, the command of
``make demo``; LLM-Seg has its own config. A finished run is kept in ``--runs`` and not repeated, so
an interrupted comparison goes on where it stopped, and rows of other methods and seeds stay in the
results file. Two runs share the machine by default, one thread each, which is faster than one after
the other with two threads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import getitem
from pathlib import Path

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

import numpy as np

from benchmarks.shared import ROOT, benchmark_parser, write_json

RESULTS = ROOT / "benchmarks" / "results" / "synthreason.json"
# Student's t for a two-sided interval of 95 %, by the number of differences.
T_QUANTILES = dict(
    zip(
        range(2, 11),
        (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262),
        strict=True,
    )
)
CONFIGS = {  # configs of the methods that --config does not fit
    "llm_seg": "configs/tiny-llm-seg.yaml",
    "cores+select": "configs/tiny-cores-select.yaml",
}


def training_command(method: str, seed: int, args: argparse.Namespace) -> list[str]:
    flags = {
        "config": CONFIGS.get(method, args.config),
        "method": method,
        "seed": seed,
        "dataset_dir": args.dataset_dir,
        "log_base_dir": args.runs,
        "exp_name": f"{method}-{seed}",
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "train_ds.py", *words, *args.extra]


def train_and_evaluate(method: str, seed: int, args: argparse.Namespace) -> dict:
    """Trains and evaluates once; returns the row of the results file. Raises RuntimeError with the
    log's end if the run fails."""
    folder = Path(args.runs) / f"{method}-{seed}"
    metrics = folder / "metrics.json"
    if not metrics.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_suffix(".log")
        env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
        with log.open("w") as stream:
            code = subprocess.run(
                training_command(method, seed, args),
                cwd=ROOT,
                env=env,
                stdout=stream,
                stderr=stream,
            ).returncode
        if code:
            raise RuntimeError(
                f"{method}, seed {seed}: exit code {code}; the end of {log}:\n"
                + log.read_text()[-2000:]
            )
    return {"method": method, "seed": seed, **json.loads(metrics.read_text())}


def table(runs: list[dict]) -> str:
    """Means over seeds with their spread (sample standard deviation), in percent."""
    lines = [
        f"{'':12} {'free gIoU':>14} {'free cIoU':>14} {'forced gIoU':>14} {'emission':>9}"
        f" {'seconds':>8}  seeds"
    ]
    for method in dict.fromkeys(row["method"] for row in runs):
        rows = [row for row in runs if row["method"] == method]

        def cell(*keys: str, rows: list[dict] = rows) -> str:
            values = [100 * reduce(getitem, keys, row) for row in rows]
            spread = f" ± {np.std(values, ddof=1):4.1f}" if len(values) > 1 else " " * 7
            return f"{np.mean(values):6.1f}{spread}"

        lines.append(
            f"{method:12} {cell('free', 'giou'):>14} {cell('free', 'ciou'):>14}"
            f" {cell('teacher_forced', 'giou'):>14}"
            f" {100 * np.mean([row['emission_rate'] for row in rows]):8.1f}%"
            f" {np.mean([row['seconds'] for row in rows]):8.0f}  "
            + ", ".join(f"{row['seed']}: {100 * row['free']['giou']:.1f}" for row in rows)
        )
    return "\n".join(lines)


def interval_over_seeds(differences: list[float]) -> tuple[float, float, float]:
    """(mean, lower, upper): the 95 % interval of Student's t for the mean of paired differences, 2
    to 10 of them. Raises KeyError for another number."""
    mean, error = np.mean(differences), np.std(differences, ddof=1) / len(differences) ** 0.5
    half = T_QUANTILES[len(differences)] * error
    return float(mean), float(mean - half), float(mean + half)


def differences(runs: list[dict]) -> str:
    """Each method against LISA, over the seeds that both have: what a difference between two means
    hides."""
    lines = []
    lisa = {row["seed"]: row for row in runs if row["method"] == "lisa"}
    for method in dict.fromkeys(row["method"] for row in runs if row["method"] != "lisa"):
        rows = [row for row in runs if row["method"] == method and row["seed"] in lisa]
        if len(rows) not in T_QUANTILES:
            continue
        for mode in ("free", "teacher_forced"):
            found = interval_over_seeds(
                [100 * (row[mode]["giou"] - lisa[row["seed"]][mode]["giou"]) for row in rows]
            )
            lines.append(
                f"{method} minus lisa, {mode} gIoU, {len(rows)} paired seeds:"
                f" {found[0]:+.1f} [{found[1]:+.1f}, {found[2]:+.1f}]"
            )
    return "\n".join(lines)


@command.entry()
def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    parser.set_defaults(json=RESULTS)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--dataset_dir", default="data/synthreason")
    parser.add_argument("--methods", nargs="+", default=["cores", "lisa"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/synthreason"))
    parser.add_argument("--table", action="store_true", help="print the results file and stop")
    args, args.extra = parser.parse_known_args(argv)
    if args.table:
        runs = json.loads(args.json.read_text())["runs"]
        print(table(runs), differences(runs), sep="\n\n")
        return
    jobs = [(method, seed) for seed in args.seeds for method in args.methods]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda job: train_and_evaluate(*job, args), jobs))
    earlier = (
        json.loads(args.json.read_text()) if args.json.exists() else {"command": "", "runs": []}
    )
    runs = [row for row in earlier["runs"] if (row["method"], row["seed"]) not in jobs] + runs
    shown = " ".join(
        ["python -m benchmarks.synthreason", *(sys.argv[1:] if argv is None else argv)]
    )
    shown = "; ".join(filter(None, dict.fromkeys([*earlier["command"].split("; "), shown])))
    write_json(args.json, {"command": shown, "unit": "fraction", "runs": runs})
    print(table(runs), differences(runs), sep="\n\n")


if __name__ == "__main__":
    sys.exit(main())

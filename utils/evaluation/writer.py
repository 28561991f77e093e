"""Writes what an evaluation found: metrics.json, the rows of every target, the page and the contact
sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cores.dataset.drawing import printable
from cores.dataset.files.write import write_text
from cores.dataset.proposals import ProposalSource
from cores.utils.evaluation.baselines import score_baselines
from cores.utils.evaluation.oracle import score_oracles
from cores.utils.evaluation.runner import evenly_spaced
from cores.utils.report.page import evaluation_page
from cores.utils.report.results import Report, versions
from cores.utils.report.tables import format_table, words
from cores.utils.report.visualize import contact_sheet
from cores.utils.training.log import read_log


def write_reports(
    reports: Sequence[Report],
    dataset,
    folder: str | Path,
    config: dict[str, Any],
    seconds: float,
    name: str = "",
    facts: dict[str, Any] | None = None,
    proposals: ProposalSource | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Prints the table and writes metrics.json, targets-<mode>.json and .csv, report.html,
    examples.png and, of reports with masks, predictions-<mode>.json.

    ``dataset``: the EvalDataset of the reports; the trivial baselines are measured on it, on as
    many images as the reports (``limit``, see ``evaluate``). ``config``: the settings of the
    program; ``seconds``: how long it has run; ``name``: who answered; ``facts``: more entries for
    metrics.json; ``proposals``: the source of a model that selects, whose ceiling is then measured,
    too. Call on one rank only. Returns what metrics.json holds (fractions).
    """
    folder, seed = Path(folder), reports[0].seed
    summaries = {report.mode: report.summary for report in reports}
    images = evenly_spaced(len(dataset), limit or len(dataset))
    baselines = score_baselines(dataset, seed, images)
    if proposals is not None:
        baselines |= score_oracles(dataset, proposals, seed, images)
    metrics = {
        "unit": "fraction",
        "name": name,
        "dataset": reports[0].dataset,
        "texts": reports[0].texts,
        **summaries,
        "emission_rate": (summaries.get("free") or reports[0].summary)["emission_rate"],
        "baselines": baselines,
        "seconds": seconds,
        "evaluation_seconds": {report.mode: report.seconds for report in reports},
        "steps": _optimizer_steps(config),
        "config": config,
        "versions": versions(),
        **(facts or {}),
    }
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    for report in reports:
        report.config, report.name = config, name
        report.to_json(folder / f"targets-{report.mode}.json")
        report.to_csv(folder / f"targets-{report.mode}.csv")
        saved = folder / f"predictions-{report.mode}.json"
        if report.masks is not None:
            write_text(saved, json.dumps(report.masks, ensure_ascii=False) + "\n")
        else:
            saved.unlink(missing_ok=True)  # An earlier evaluation's would be taken for these.
    # An evaluation of its own has no log in its folder.
    log = read_log(folder / "log.jsonl") if (folder / "log.jsonl").is_file() else []
    write_text(folder / "report.html", evaluation_page(reports, baselines, versions(), log))
    if pictured := next((report for report in reports if report.examples), None):
        title = f"{pictured.dataset}, {words(pictured.mode)}: {pictured.line()}"
        contact_sheet(pictured.examples, folder / "examples.png", title)
    who = f"{printable(name)} on " if name else ""
    print(f"\n{who}{reports[0].dataset}, percent [95 % interval]")
    print(format_table(summaries | baselines))
    for report in reports:
        for warning in report.warnings:
            print(f"WARNING, {words(report.mode)}: {warning}")
    files = "report.html, metrics.json, targets-*.json, targets-*.csv, examples.png"
    files += ", predictions-*.json" if any(report.masks is not None for report in reports) else ""
    print(f"written to {folder}/: {files}", flush=True)
    return metrics


def _optimizer_steps(config: dict[str, Any]) -> int | None:
    """Of the run that was evaluated; None where the settings do not tell."""
    if config.get("eval_only") or not {"epochs", "steps_per_epoch"} <= config.keys():
        return None
    return (config["epochs"] - config.get("start_epoch", 0)) * config["steps_per_epoch"]

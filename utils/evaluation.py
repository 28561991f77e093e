"""Runs a model over an evaluation set and reports what it is worth.

Two modes, never mixed in one number:

teacher_forced  the published protocol: the answer with its special tokens stands in the input, only the masks are tested
free            the honest one: the model answers by itself; a target for which it emits no mask scores 0

Which wordings of a query are asked (the first one, as published, or all) is the evaluation set's ``texts``.
K targets of one conversation · T levels · H, W an image in the original frame.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dataset.conversation import answer_from_ids, answer_text
from dataset.sample import Batch, Sample, collate, collate_prompts
from model.cores import Generation, Segmentation
from utils import distributed
from utils.baselines import score_baselines
from utils.checkpoint import write_text
from utils.metrics import TargetScore, score_target, summarise
from utils.oracle import score_oracles
from utils.visualize import Example, contact_sheet

MODES = ("free", "teacher_forced")
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "segment-anything", "numpy")
# An image with more conversations than this takes several passes: one pass for all is how evaluation runs out of memory.
CONVERSATIONS_PER_IMAGE = 8


@dataclass
class Report:
    """What one evaluation found. All scores are fractions; ``table`` prints percent."""

    mode: str
    """"free" or "teacher_forced"."""
    dataset: str
    """Name of the evaluation set, "SynthReason|val"."""
    texts: str
    """"first" or "all" wordings of a query."""
    summary: dict[str, Any]
    """See utils.metrics.summarise."""
    scores: list[TargetScore]
    """One per target, in the order of the evaluation set, whatever the number of ranks."""
    examples: list[Example]
    seconds: float
    seed: int
    """Of the bootstrap."""
    config: dict[str, Any] = field(default_factory=dict)
    """The settings of the program that made the report."""

    def table(self) -> str:
        return format_table({self.mode: self.summary})

    def line(self) -> str:
        """The summary in one line, in percent."""
        s = self.summary
        shown = f"gIoU {_percent(s['giou'])} {_interval(s['giou_ci95'])}, cIoU {_percent(s['ciou'])}"
        shown += f", emission {_percent(s['emission_rate'])} %"
        if s["wrong_host_rate"] is not None:
            shown += f", wrong host {_percent(s['wrong_host_rate'])} %"
        if s["first_host_iou"] is not None:
            shown += f", first mask on host {_percent(s['first_host_iou'])}"
        return shown + f" (n = {s['n']})"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures."""
        return {
            "unit": "fraction",
            "mode": self.mode,
            "dataset": self.dataset,
            "texts": self.texts,
            "summary": self.summary,
            "seconds": self.seconds,
            "seed": self.seed,
            "config": self.config,
            "versions": versions(),
            "targets": [dataclasses.asdict(score) for score in self.scores],
        }

    def to_json(self, path: str | Path) -> None:
        """Writes ``to_dict`` in one step: the file is never half written."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a score."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


# ------------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class _Part:
    """Some conversations of one image; ``first`` is the index of their first one in the whole sample."""

    index: int
    sample: Sample
    first: int


def _parts(dataset, indices: Sequence[int]) -> Iterator[_Part]:
    for index in indices:
        sample = dataset[index]
        text_only = next((i for i, conversation in enumerate(sample.conversations) if not len(conversation.masks)), None)
        if text_only is not None:
            raise ValueError(
                f"{sample.name}, conversation {text_only}: has no target mask, so it cannot be scored; evaluate a segmentation set"
            )
        for first in range(0, len(sample.conversations), CONVERSATIONS_PER_IMAGE):
            chosen = sample.conversations[first : first + CONVERSATIONS_PER_IMAGE]
            yield _Part(index, dataclasses.replace(sample, conversations=chosen), first)


def _batches(parts: Iterator[_Part], batch_size: int) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    for part in parts:
        batch.append(part)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def evenly_spaced(total: int, count: int) -> list[int]:
    """``count`` different indices of range(total), spread over all of it; all of them if there are fewer."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()


class _Runner:
    """One rank's share of an evaluation."""

    def __init__(self, model, processor, mode: str, max_new_tokens: int, pictured: set[int]):
        self.model, self.processor = model, processor
        self.mode, self.max_new_tokens = mode, max_new_tokens
        self.pictured = pictured
        weights = [p for p in model.parameters() if p.is_floating_point()]
        self.device, self.dtype = weights[0].device, weights[0].dtype
        self.scores: list[tuple[tuple[int, int, int], TargetScore]] = []
        self.examples: list[tuple[int, Example]] = []

    def run(self, parts: Sequence[_Part]) -> None:
        """Scores the conversations of ``parts``; their masks are dropped at once."""
        samples, levels = [part.sample for part in parts], self.processor.levels
        build = collate if self.mode == "teacher_forced" else collate_prompts
        batch = build(samples, self.processor, levels, self.processor.template).to(self.device, self.dtype)
        if self.mode == "teacher_forced":
            answers = self.model.segment(batch)
        else:
            answers = self.model.generate(batch, self.processor.tokenizer, max_new_tokens=self.max_new_tokens)
        rows = [(part, part.first + i) for part in parts for i in range(len(part.sample.conversations))]
        for row, ((part, conversation), answer) in enumerate(zip(rows, answers, strict=True)):
            self._score(part, conversation, batch, row, answer.masks)
            if conversation == 0 and part.index in self.pictured:
                text = self._words(answer)
                self.examples.append((part.index, self._picture(part, batch, row, answer.masks, text)))

    def _words(self, answer: Segmentation) -> str:
        """What the model said, spaced as people read it; nothing in a teacher-forced pass."""
        if not isinstance(answer, Generation):
            return ""
        return answer_text(answer_from_ids(answer.token_ids, self.processor.tokenizer, self.processor.levels)).strip()

    def _score(self, part: _Part, conversation: int, batch: Batch, row: int, masks: torch.Tensor) -> None:
        """The k-th group of masks (G, T, H, W) belongs to the k-th target, as the answer names them in order."""
        targets, hosts = batch.target_masks[row], batch.host_masks[row]
        for k, target in enumerate(targets):
            found = score_target(
                masks[k] if k < len(masks) else None,
                target,
                batch.ignore_masks[row],
                None if hosts is None else hosts[k],
            )
            surplus = max(0, len(masks) - len(targets)) if k == 0 else 0
            score = TargetScore(
                dataset=part.sample.dataset,
                id=part.sample.id,
                conversation=conversation,
                target=k,
                query=batch.info[row]["query"],
                is_sentence=batch.info[row]["is_sentence"],
                surplus=surplus,
                **found,
            )
            self.scores.append(((part.index, conversation, k), score))

    def _picture(self, part: _Part, batch: Batch, row: int, masks: torch.Tensor, text: str) -> Example:
        ignore = batch.ignore_masks[row]
        return Example(
            image=part.sample.image,
            query=batch.info[row]["query"],
            answer=text,
            levels=list(self.processor.levels),
            masks=masks[0].cpu().numpy() if len(masks) else None,
            target=batch.target_masks[row][0].cpu().numpy(),
            ignore=None if ignore is None else ignore.cpu().numpy(),
            name=f"{part.sample.dataset} {part.sample.id}",
        )


@torch.no_grad()
def evaluate(
    model,
    processor,
    dataset,
    mode: str,
    *,
    batch_size: int = 1,
    max_new_tokens: int = 64,
    limit: int | None = None,
    examples: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Scores ``model`` on ``dataset``; every rank gets the whole report.

    ``model``: CoresForReasoningSegmentation, on the device and in the precision to use. ``dataset``: an EvalDataset.
    ``mode``: "teacher_forced" or "free". ``batch_size``: images per rank in a pass. ``limit``: at most so many images,
    spread evenly over the set. ``examples``: pictures to keep. Rank r takes the images r, r + ranks, …, so no target is
    counted twice, whatever the number of ranks; with ZeRO-3 the ranks' shares must be equal. The model's
    training mode is restored. Raises ValueError for an unknown mode or a set without targets.
    """
    if mode not in MODES:
        raise ValueError(f"evaluation mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    if batch_size < 1:
        raise ValueError(f"evaluation batch size must be at least 1, got {batch_size}")
    if limit is not None and limit < 1:
        raise ValueError(f"evaluation limit must be at least 1 image, got {limit}; None evaluates all")
    indices = evenly_spaced(len(dataset), len(dataset) if limit is None else limit)
    pictured = {indices[i] for i in evenly_spaced(len(indices), examples)}
    mine = indices[distributed.rank() :: distributed.world_size()]
    runner = _Runner(model, processor, mode, max_new_tokens, pictured)
    training, started = model.training, time.perf_counter()
    model.eval()
    try:
        _run_all(runner, dataset, mine, batch_size, progress and distributed.is_main())
    finally:
        model.train(training)
    scores = [score for _, score in sorted(distributed.gather_lists(runner.scores), key=lambda pair: pair[0])]
    kept = [example for _, example in sorted(distributed.gather_lists(runner.examples), key=lambda pair: pair[0])]
    return Report(
        mode=mode,
        dataset=dataset.loader.dataset,
        texts=dataset.loader.options.texts,
        summary=summarise(scores, seed=seed),
        scores=scores,
        examples=kept,
        seconds=time.perf_counter() - started,
        seed=seed,
    )


def _run_all(runner: _Runner, dataset, indices: Sequence[int], batch_size: int, progress: bool) -> None:
    done = 0
    with tqdm(total=len(indices), desc=runner.mode.replace("_", " "), unit="image", disable=not progress) as bar:
        for parts in _batches(_parts(dataset, indices), batch_size):
            runner.run(parts)
            bar.update(sum(part.first == 0 for part in parts))
            fresh = runner.scores[done:]
            done = len(runner.scores)
            if fresh:
                mean = sum(score.iou for _, score in runner.scores) / done
                bar.set_postfix({"gIoU": f"{100 * mean:.1f}"}, refresh=False)


# ----------------------------------------------------------------------------------------------------------- reporting


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _interval(pair: list[float]) -> str:
    return f"[{100 * pair[0]:.1f}, {100 * pair[1]:.1f}]"


COLUMNS = {
    "gIoU": lambda s: f"{_percent(s['giou'])} {_interval(s['giou_ci95'])}",
    "cIoU": lambda s: f"{_percent(s['ciou'])} {_interval(s['ciou_ci95'])}",
    "short": lambda s: _percent(s.get("giou_short")),
    "long": lambda s: _percent(s.get("giou_long")),
    "emission": lambda s: _percent(s.get("emission_rate")),
    "wrong host": lambda s: _percent(s.get("wrong_host_rate")),
    "1st mask on host": lambda s: _percent(s.get("first_host_iou")),
    "n": lambda s: str(s["n"]),
}


def format_table(rows: dict[str, dict[str, Any]]) -> str:
    """A text table in percent with 95 % intervals; ``rows``: name -> a summary of utils.metrics or utils.baselines.

    A column that no row fills is left out.
    """
    cells = {title: [show(summary) for summary in rows.values()] for title, show in COLUMNS.items()}
    cells = {title: column for title, column in cells.items() if any(cell != "–" for cell in column)}
    names = [name.replace("_", " ") for name in rows]
    width = max(map(len, names))
    widths = {title: max(len(title), *map(len, column)) for title, column in cells.items()}
    lines = [" " * width + "  " + "  ".join(title.rjust(widths[title]) for title in cells)]
    lines.append("─" * len(lines[0]))
    for i, name in enumerate(names):
        lines.append(name.ljust(width) + "  " + "  ".join(cells[title][i].rjust(widths[title]) for title in cells))
    return "\n".join(lines)


def write_reports(
    reports: Sequence[Report], dataset, folder: str | Path, config: dict[str, Any], seconds: float, proposals=None
) -> dict[str, Any]:
    """Prints the table and writes metrics.json, targets-<mode>.json and examples.png into ``folder``.

    ``dataset``: the EvalDataset of the reports; the trivial baselines are measured on it. ``config``: the settings of
    the program; ``seconds``: how long it has run; ``proposals``: the ProposalSource of a model that selects, whose ceiling is
    measured, too. Call on one rank only. Returns what metrics.json holds (fractions).
    """
    folder = Path(folder)
    summaries = {report.mode: report.summary for report in reports}
    baselines = score_baselines(dataset, seed=reports[0].seed)
    if proposals is not None:
        baselines |= score_oracles(dataset, proposals, seed=reports[0].seed)
    metrics = {
        "unit": "fraction",
        "dataset": reports[0].dataset,
        "texts": reports[0].texts,
        **summaries,
        "emission_rate": (summaries.get("free") or reports[0].summary)["emission_rate"],
        "baselines": baselines,
        "seconds": seconds,
        "evaluation_seconds": {report.mode: report.seconds for report in reports},
        "steps": _steps(config),
        "config": config,
        "versions": versions(),
    }
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    for report in reports:
        report.config = config
        report.to_json(folder / f"targets-{report.mode}.json")
    if pictured := next((report for report in reports if report.examples), None):
        title = f"{pictured.dataset}, {pictured.mode.replace('_', ' ')}: {pictured.line()}"
        contact_sheet(pictured.examples, folder / "examples.png", title)
    print(f"\n{reports[0].dataset}, percent [95 % interval]\n" + format_table(summaries | baselines))
    print(f"written to {folder}/: metrics.json, targets-*.json, examples.png", flush=True)
    return metrics


def _steps(config: dict[str, Any]) -> int | None:
    """Optimizer steps of the run that was evaluated; None where the settings do not say."""
    if config.get("eval_only") or not {"epochs", "steps_per_epoch"} <= config.keys():
        return None
    return (config["epochs"] - config.get("start_epoch", 0)) * config["steps_per_epoch"]

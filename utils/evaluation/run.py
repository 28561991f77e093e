"""Runs a model over an evaluation set and reports what it is worth.

Two modes, never mixed in one number:

teacher_forced  the published protocol: the answer with its special tokens stands in the input, only the masks are tested
free            the honest one: the model answers by itself; a target for which it emits no mask scores 0, or 1 if it is empty

Which wordings of a query are asked (the first one, as published, or all) is the evaluation set's
``texts``. K targets of one conversation · T levels · H, W an image in the original frame.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dataset.collate import Batch, collate, collate_prompts
from dataset.conversation.turns import text_from_ids
from dataset.drawing import printable
from dataset.files.write import write_text
from dataset.proposals import ProposalSource
from dataset.sample import Sample
from model.masks import Generation, Segmentation
from utils import distributed
from utils.evaluation.baselines import score_baselines
from utils.evaluation.oracle import score_oracles
from utils.metrics import TargetScore, score_target, summarise
from utils.report.gallery import Gallery, Order
from utils.report.page import evaluation_page
from utils.report.results import Report, versions
from utils.report.tables import format_table, words
from utils.report.visualize import Example, contact_sheet

MODES = ("free", "teacher_forced")
# An image with more conversations than this takes several passes: one pass for all is how
# evaluation runs out of memory.
CONVERSATIONS_PER_IMAGE = 8


# ------------------------------------------------------------------------------------------ running


@dataclass(frozen=True)
class Part:
    """Some conversations of one image; ``first`` is the index of their first one in the whole
    sample."""

    index: int
    sample: Sample
    first: int


def parts_of(dataset, indices: Sequence[int]) -> Iterator[Part]:
    """The conversations of these images, few at a time. Raises ValueError for one without a
    target."""
    for index in indices:
        sample = dataset[index]
        text_only = next(
            (
                i
                for i, conversation in enumerate(sample.conversations)
                if not len(conversation.masks)
            ),
            None,
        )
        if text_only is not None:
            raise ValueError(
                f"{sample.name}, conversation {text_only}: has no target mask, so it cannot be"
                " scored; evaluate a segmentation set"
            )
        for first in range(0, len(sample.conversations), CONVERSATIONS_PER_IMAGE):
            chosen = sample.conversations[first : first + CONVERSATIONS_PER_IMAGE]
            yield Part(index, dataclasses.replace(sample, conversations=chosen), first)


def _batches(parts: Iterator[Part], batch_size: int) -> Iterator[list[Part]]:
    batch: list[Part] = []
    for part in parts:
        batch.append(part)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def evenly_spaced(total: int, count: int) -> list[int]:
    """``count`` different indices of range(total), spread over all of it; all of them if there are
    fewer."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()


@dataclass(frozen=True)
class Truth:
    """What one conversation should have been answered: K targets, all masks bool on one device."""

    sample: Sample
    conversation: int
    """Its index in the whole sample."""
    query: str
    is_sentence: bool | None
    targets: torch.Tensor
    """(K, H, W)."""
    ignore: torch.Tensor | None
    """(H, W)."""
    hosts: torch.Tensor | None
    """(K, H, W)."""


class Collector:
    """Scores answers one by one and forgets their masks, except those of a few pictures.

    ``levels``: the names of the masks of a group, coarse to fine. ``pictured``: images whose first
    answer goes to the contact sheet. ``gallery``: pictures of each kind in the report.
    """

    def __init__(self, levels: Sequence[str], pictured: set[int], gallery: int, seed: int):
        self.levels, self.pictured = list(levels), pictured
        self.gallery = Gallery(gallery, seed)
        self.scores: list[tuple[Order, TargetScore]] = []
        self.examples: list[tuple[int, Example]] = []

    def add(
        self,
        index: int,
        truth: Truth,
        masks: Sequence[torch.Tensor | None],
        answer: str = "",
        surplus: int = 0,
    ) -> None:
        """The k-th of ``masks``, bool (T, H, W) or None, belongs to the k-th target of image
        ``index``; missing ones were not answered, those beyond the targets are counted, with
        ``surplus``, as unasked."""
        surplus += max(0, len(masks) - len(truth.targets))
        for k, target in enumerate(truth.targets):
            group = masks[k] if k < len(masks) else None
            score = TargetScore(
                dataset=truth.sample.dataset,
                id=truth.sample.id,
                conversation=truth.conversation,
                target=k,
                query=truth.query,
                is_sentence=truth.is_sentence,
                surplus=surplus if k == 0 else 0,
                answer=answer,
                **score_target(
                    group, target, truth.ignore, None if truth.hosts is None else truth.hosts[k]
                ),
            )
            order = (index, truth.conversation, k)
            self.scores.append((order, score))
            self.gallery.offer(
                order, score, lambda k=k, group=group: self._example(truth, k, group, answer)
            )
        if truth.conversation == 0 and index in self.pictured:
            first = masks[0] if len(masks) else None
            self.examples.append((index, self._example(truth, 0, first, answer)))

    def _example(
        self, truth: Truth, target: int, masks: torch.Tensor | None, answer: str
    ) -> Example:
        return Example(
            image=truth.sample.image,
            query=truth.query,
            answer=answer,
            levels=self.levels,
            masks=None if masks is None else masks.cpu().numpy(),
            target=truth.targets[target].cpu().numpy(),
            ignore=None if truth.ignore is None else truth.ignore.cpu().numpy(),
            name=f"{truth.sample.dataset} {truth.sample.id}",
        )

    def report(self, mode: str, dataset, seconds: float) -> Report:
        """Of all ranks together, the same on every one of them. Raises ValueError if none scored a
        target."""
        scores = [
            score
            for _, score in sorted(distributed.gather_lists(self.scores), key=lambda pair: pair[0])
        ]
        kept = [
            example
            for _, example in sorted(
                distributed.gather_lists(self.examples), key=lambda pair: pair[0]
            )
        ]
        shown = Gallery(self.gallery.count, self.gallery.seed)
        shown.add(distributed.gather_lists(self.gallery.entries))
        return Report(
            mode=mode,
            dataset=dataset.loader.dataset,
            texts=dataset.loader.options.texts,
            summary=summarise(scores, seed=shown.seed),
            scores=scores,
            examples=kept,
            seconds=seconds,
            seed=shown.seed,
            pictures=shown.pictures,
        )


class _Runner:
    """One rank's share of an evaluation."""

    def __init__(self, model, processor, mode: str, max_new_tokens: int, collector: Collector):
        self.model, self.processor = model, processor
        self.mode, self.max_new_tokens = mode, max_new_tokens
        self.collector = collector
        weights = [p for p in model.parameters() if p.is_floating_point()]
        self.device, self.dtype = weights[0].device, weights[0].dtype

    def run(self, parts: Sequence[Part]) -> None:
        """Scores the conversations of ``parts``; their masks are dropped at once."""
        samples, levels = [part.sample for part in parts], self.processor.levels
        build = collate if self.mode == "teacher_forced" else collate_prompts
        batch = build(samples, self.processor, levels, self.processor.conversation).to(
            self.device, self.dtype
        )
        if self.mode == "teacher_forced":
            answers = self.model.segment(batch)
        else:
            answers = self.model.generate(
                batch, self.processor.tokenizer, max_new_tokens=self.max_new_tokens
            )
        rows = [
            (part, part.first + i) for part in parts for i in range(len(part.sample.conversations))
        ]
        for row, ((part, conversation), answer) in enumerate(zip(rows, answers, strict=True)):
            self.collector.add(
                part.index,
                _truth(part.sample, conversation, batch, row),
                answer.masks,
                self._words(answer),
            )

    def _words(self, answer: Segmentation) -> str:
        """What the model said, spaced as people read it; nothing in a teacher-forced pass."""
        if not isinstance(answer, Generation):
            return ""
        return text_from_ids(answer.token_ids, self.processor.tokenizer, self.processor.levels)


def _truth(sample: Sample, conversation: int, batch: Batch, row: int) -> Truth:
    return Truth(
        sample=sample,
        conversation=conversation,
        query=batch.info[row]["query"],
        is_sentence=batch.info[row]["is_sentence"],
        targets=batch.target_masks[row],
        ignore=batch.ignore_masks[row],
        hosts=batch.host_masks[row],
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
    gallery: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Scores ``model`` on ``dataset``; every rank gets the whole report.

    ``model``: CoresForReasoningSegmentation, on the device and in the precision to use.
    ``dataset``: an EvalDataset. ``mode``: "teacher_forced" or "free". ``batch_size``: images per
    rank in a pass. ``limit``: at most so many images, spread evenly over the set. ``examples``:
    rows of the contact sheet; ``gallery``: pictures of each kind in the report. Rank r takes the
    images r, r + ranks, …, so no target is counted twice, whatever the number of ranks; with ZeRO-3
    the ranks' shares must be equal. The model's training mode is restored. Raises ValueError for an
    unknown mode or a set without targets.
    """
    if mode not in MODES:
        raise ValueError(f"evaluation mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    if batch_size < 1:
        raise ValueError(f"evaluation batch size must be at least 1, got {batch_size}")
    if limit is not None and limit < 1:
        raise ValueError(
            f"evaluation limit must be at least 1 image, got {limit}; None evaluates all"
        )
    indices = evenly_spaced(len(dataset), len(dataset) if limit is None else limit)
    pictured = {indices[i] for i in evenly_spaced(len(indices), examples)}
    mine = indices[distributed.rank() :: distributed.world_size()]
    collector = Collector(processor.levels, pictured, gallery, seed)
    runner = _Runner(model, processor, mode, max_new_tokens, collector)
    training, started = model.training, time.perf_counter()
    model.eval()
    try:
        _run_all(runner, dataset, mine, batch_size, progress and distributed.is_main())
    finally:
        model.train(training)
    return collector.report(mode, dataset, time.perf_counter() - started)


def _run_all(
    runner: _Runner, dataset, indices: Sequence[int], batch_size: int, progress: bool
) -> None:
    done = 0
    with tqdm(
        total=len(indices), desc=runner.mode.replace("_", " "), unit="image", disable=not progress
    ) as bar:
        for parts in _batches(parts_of(dataset, indices), batch_size):
            runner.run(parts)
            bar.update(sum(part.first == 0 for part in parts))
            scores = runner.collector.scores
            if len(scores) > done:
                done = len(scores)
                mean = sum(score.iou for _, score in scores) / done
                bar.set_postfix({"gIoU": f"{100 * mean:.1f}"}, refresh=False)


# ---------------------------------------------------------------------------------------- reporting


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
    """Prints the table and writes metrics.json, targets-<mode>.json and .csv, report.html and
    examples.png.

    ``dataset``: the EvalDataset of the reports; the trivial baselines are measured on it, on as
    many images as the reports (``limit``, see ``evaluate``). ``config``: the settings of the
    program; ``seconds``: how long it has run; ``name``: who answered; ``facts``: more entries for
    metrics.json; ``proposals``: of a model that selects, whose ceiling is measured, too. Call on
    one rank only. Returns what metrics.json holds (fractions).
    """
    folder = Path(folder)
    summaries = {report.mode: report.summary for report in reports}
    images = evenly_spaced(len(dataset), limit or len(dataset))
    baselines = score_baselines(dataset, seed=reports[0].seed, indices=images)
    if proposals is not None:
        baselines |= score_oracles(dataset, proposals, seed=reports[0].seed, indices=images)
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
        "steps": _steps(config),
        "config": config,
        "versions": versions(),
        **(facts or {}),
    }
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    for report in reports:
        report.config, report.name = config, name
        report.to_json(folder / f"targets-{report.mode}.json")
        report.to_csv(folder / f"targets-{report.mode}.csv")
    write_text(folder / "report.html", evaluation_page(reports, baselines, versions()))
    if pictured := next((report for report in reports if report.examples), None):
        title = f"{pictured.dataset}, {words(pictured.mode)}: {pictured.line()}"
        contact_sheet(pictured.examples, folder / "examples.png", title)
    print(
        f"\n{f'{printable(name)} on ' if name else ''}{reports[0].dataset}, percent [95 %"
        " interval]\n" + format_table(summaries | baselines)
    )
    print(
        f"written to {folder}/: report.html, metrics.json, targets-*.json, targets-*.csv,"
        " examples.png",
        flush=True,
    )
    return metrics


def _steps(config: dict[str, Any]) -> int | None:
    """Optimizer steps of the run that was evaluated; None where the settings do not say."""
    if config.get("eval_only") or not {"epochs", "steps_per_epoch"} <= config.keys():
        return None
    return (config["epochs"] - config.get("start_epoch", 0)) * config["steps_per_epoch"]

"""Runs a model over an evaluation set and scores what it answers.

There are two modes, whose numbers are never mixed:

teacher_forced  the published protocol: the answer with its special tokens is part of the input, so
                only the masks are tested
free            the model generates the answer; a target for which it emits no mask scores 0, or 1
                where the target is empty

Whether the first wording of a query (the published protocol) or every wording is asked is decided
by the ``texts`` of the evaluation set. K targets of one conversation · T levels · H, W an image in
the original frame.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

from cores.dataset.collate import collate, collate_prompts, token_counts
from cores.dataset.conversation.turns import text_from_ids
from cores.dataset.files.errors import DataError
from cores.dataset.sample import Sample
from cores.model.checkpoints.weights import NonFiniteAnswer
from cores.utils import distributed
from cores.utils.evaluation.collector import Collector, GroundTruth
from cores.utils.report.results import Report
from cores.utils.report.tables import percent, words

MODES = ("free", "teacher_forced")
# The memory of a pass grows with its conversations, so an image with more takes several passes.
CONVERSATIONS_PER_PASS = 8


@dataclass(frozen=True)
class EvalShard:
    """Some conversations of one image."""

    index: int
    """Of the image in the evaluation set."""
    sample: Sample
    """With these conversations only."""
    first: int
    """Index of the first of them among all conversations of the image."""


def shards_of(dataset, indices: Sequence[int]) -> Iterator[EvalShard]:
    """The conversations of these images, at most ``CONVERSATIONS_PER_PASS`` at a time. Raises
    ValueError for a conversation without a target."""
    for index in indices:
        sample = dataset[index]
        for number, conversation in enumerate(sample.conversations):
            if not len(conversation.masks):
                raise ValueError(
                    f"{sample.name}, conversation {number}: has no target mask, so it cannot be"
                    " scored; evaluate a segmentation set"
                )
        for first in range(0, len(sample.conversations), CONVERSATIONS_PER_PASS):
            chosen = sample.conversations[first : first + CONVERSATIONS_PER_PASS]
            yield EvalShard(index, dataclasses.replace(sample, conversations=chosen), first)


def evenly_spaced(total: int, count: int) -> list[int]:
    """``count`` different indices of range(total), spread over all of it; all of them if there are
    fewer."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()


def refuse_too_long(dataset, processor, modes: Sequence[str], indices: Sequence[int]) -> None:
    """Raises DataError that names the images of ``indices`` with a conversation that ``evaluate``
    could not ask, so that it is known before hours of work. Each image is looked at once."""
    limit, levels = processor.tokenizer.model_max_length, processor.levels
    known = dataset.__dict__.setdefault("measured", set())  # (mode, limit, image)

    def longest(index: int) -> tuple[str, int]:
        sample = dataset[index]
        counts = (
            token_counts(sample, processor, levels, processor.conversation, mode == "free")
            for mode in modes
        )
        return sample.name, max((count for found in counts for count in found), default=0)

    new = [i for i in indices if any((mode, limit, i) not in known for mode in modes)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Decoding frees the interpreter.
        found = list(pool.map(longest, new))
    known.update((mode, limit, index) for index in new for mode in modes)
    bad = [f"{name} ({count} tokens)" for name, count in found if count > limit]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DataError(
            f"{dataset.loader.dataset}: {len(bad)} of {len(new)} images have a question that is"
            f" longer than --model_max_length {limit}: {', '.join(bad[:3])}{more}; raise the flag,"
            " use fewer exemplars or shorten the questions"
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
    save_masks: bool = False,
    progress: bool = True,
) -> Report:
    """Scores ``model`` on ``dataset``; every rank gets the whole report.

    ``model``: CoresForReasoningSegmentation, on the device and in the precision to use.
    ``dataset``: an EvalDataset. ``mode``: "teacher_forced" or "free". ``batch_size``: images per
    rank in a pass. ``limit``: at most so many images, spread evenly over the set. ``examples``:
    rows of the contact sheet; ``gallery``: pictures of each kind in the report; ``save_masks``: the
    report keeps all final masks. Rank r takes the
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
    refuse_too_long(dataset, processor, [mode], mine)
    collector = Collector(processor.levels, pictured, gallery, seed, save_masks)
    shown = progress and distributed.is_main()
    training, started = model.training, time.perf_counter()
    model.eval()
    try:
        with tqdm(total=len(mine), desc=words(mode), unit="image", disable=not shown) as bar:
            shards = shards_of(dataset, mine)
            while chosen := list(islice(shards, batch_size)):
                for truth, masks, text in _answer_shards(
                    model, processor, chosen, mode, max_new_tokens
                ):
                    collector.add(truth, masks, text)
                bar.update(sum(shard.first == 0 for shard in chosen))
                bar.set_postfix({"gIoU": percent(collector.giou)}, refresh=False)
    finally:
        model.train(training)
    return collector.report(mode, dataset, time.perf_counter() - started)


def _answer_shards(
    model, processor, shards: Sequence[EvalShard], mode: str, max_new_tokens: int
) -> Iterator[tuple[GroundTruth, torch.Tensor, str]]:
    """One pass: the ground truth of every conversation, its masks, bool (K', T, H, W), and the
    generated text, "" in a teacher-forced pass."""
    weights = next(p for p in model.parameters() if p.is_floating_point())
    samples, levels = [shard.sample for shard in shards], processor.levels
    build = collate if mode == "teacher_forced" else collate_prompts
    batch = build(samples, processor, levels, processor.conversation)
    batch = batch.to(weights.device, weights.dtype)
    try:
        if mode == "teacher_forced":
            answers = model.segment(batch)
            texts = [""] * len(answers)
        else:
            tokenizer = processor.tokenizer
            answers = model.generate(batch, tokenizer, max_new_tokens=max_new_tokens)
            texts = [text_from_ids(answer.token_ids, tokenizer, levels) for answer in answers]
    except NonFiniteAnswer as error:
        raise NonFiniteAnswer(f"{', '.join(sample.name for sample in samples)}: {error}") from None
    places = [(shard, i) for shard in shards for i in range(len(shard.sample.conversations))]
    for row, ((shard, i), answer) in enumerate(zip(places, answers, strict=True)):
        truth = GroundTruth(
            index=shard.index,
            sample=shard.sample,
            conversation=shard.first + i,
            query=batch.info[row]["query"],
            is_sentence=batch.info[row]["is_sentence"],
            targets=batch.target_masks[row],
            ignore=batch.ignore_masks[row],
            hosts=batch.host_masks[row],
        )
        yield truth, answer.masks, texts[row]

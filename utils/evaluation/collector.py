"""Scores answers one by one and keeps what a report needs of them: numbers, and a few pictures.

K targets of one conversation · T levels · H, W an image in the original frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch

from cores.dataset.files.rle import encode_rle
from cores.dataset.sample import Sample
from cores.utils import distributed, metrics
from cores.utils.metrics import TargetScore, score_target, summarise_scores
from cores.utils.report.gallery import Gallery, Order
from cores.utils.report.results import Report
from cores.utils.report.visualize import Example


@dataclass(frozen=True)
class GroundTruth:
    """What one conversation should have been answered. All masks are on one device."""

    index: int
    """Of the image in the evaluation set."""
    sample: Sample
    conversation: int
    """Index among all conversations of the image."""
    query: str
    is_sentence: bool | None
    targets: torch.Tensor
    """bool (K, H, W)."""
    ignore: torch.Tensor | None
    """bool (H, W)."""
    hosts: torch.Tensor | None
    """bool (K, H, W)."""


class Collector:
    """Scores answers and forgets their masks, except those of a few pictures."""

    def __init__(
        self,
        levels: Sequence[str],
        pictured: set[int],
        gallery: int,
        seed: int,
        keep_masks: bool = False,
    ):
        """``levels``: the names of the masks of a target, coarse to fine. ``pictured``: indices of
        the images whose first answer goes to the contact sheet. ``gallery``: pictures of each kind
        in the report. ``seed``: of the bootstrap and of the choice of pictures. ``keep_masks``: as
        run lengths."""
        self.levels, self.pictured = list(levels), pictured
        self.gallery = Gallery(gallery, seed)
        self.scores: list[tuple[Order, TargetScore]] = []
        self.examples: list[tuple[int, Example]] = []
        self.masks: list[tuple[Order, dict[str, Any]]] | None = [] if keep_masks else None
        """In the form that utils.evaluation.predictions reads."""

    @property
    def giou(self) -> float:
        """Of this rank so far."""
        return metrics.giou([score.iou for _, score in self.scores])

    def add(
        self,
        truth: GroundTruth,
        masks: Sequence[torch.Tensor | None] | torch.Tensor,
        answer: str = "",
        extra_masks: int = 0,
    ) -> None:
        """Scores one answer, whose k-th mask, bool (T, H, W) or None, belongs to the k-th target.

        Targets beyond the masks were not answered. Masks beyond the targets add to
        the count ``extra_masks``. ``answer``: the generated text.
        """
        extra_masks += max(0, len(masks) - len(truth.targets))
        for k, target in enumerate(truth.targets):
            group = masks[k] if k < len(masks) else None
            host = None if truth.hosts is None else truth.hosts[k]
            score = TargetScore(
                dataset=truth.sample.dataset,
                id=truth.sample.id,
                conversation=truth.conversation,
                target=k,
                query=truth.query,
                is_sentence=truth.is_sentence,
                extra_masks=extra_masks if k == 0 else 0,
                answer=answer,
                **score_target(group, target, truth.ignore, host),
            )
            order = (truth.index, truth.conversation, k)
            example = partial(self._example, truth, k, group, answer)
            self.scores.append((order, score))
            self.gallery.offer(order, score, example)
            if self.masks is not None and group is not None:
                entry = {"image_id": score.id, "conversation": score.conversation, "target": k}
                entry |= {"answer": answer, "segmentation": encode_rle(group[-1].cpu().numpy())}
                self.masks.append((order, entry))
            if k == truth.conversation == 0 and truth.index in self.pictured:
                self.examples.append((truth.index, example()))

    def _example(
        self, truth: GroundTruth, target: int, masks: torch.Tensor | None, answer: str
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
        """The report of all ranks together, the same on every one of them. ``dataset``: the
        EvalDataset. Raises ValueError if no rank scored a target."""
        by_place = itemgetter(0)
        scores = sorted(distributed.gather_lists(self.scores), key=by_place)
        examples = sorted(distributed.gather_lists(self.examples), key=by_place)
        shown = Gallery(self.gallery.count, self.gallery.seed)
        shown.add(distributed.gather_lists(self.gallery.entries))
        masks = None
        if self.masks is not None:
            masks = sorted(distributed.gather_lists(self.masks), key=by_place)
        return Report(
            mode=mode,
            dataset=dataset.loader.dataset,
            texts=dataset.loader.options.texts,
            summary=summarise_scores([score for _, score in scores], shown.seed),
            scores=[score for _, score in scores],
            examples=[example for _, example in examples],
            seconds=seconds,
            seed=shown.seed,
            pictures=shown.pictures,
            masks=None if masks is None else [entry for _, entry in masks],
        )

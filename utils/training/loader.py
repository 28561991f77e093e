"""Batches for every rank: which samples it reads, in which order, by which processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from dataset.collate import Batch, collate
from dataset.mixture import TrainMixture
from model.processor import CoresProcessor
from utils import distributed
from utils.settings.arguments import Settings

WORKER_GRACE = 60  # seconds that a data worker outlives SIGTERM, so that its rank can save


class RankSampler(Sampler[int]):
    """Indices of one rank: a step takes ``world`` consecutive groups of ``batch`` samples, one for
    each rank.

    The samples of a step are therefore the same for any number of ranks that gives the same total
    batch.
    """

    def __init__(self, total: int, batch: int, rank: int, world: int):
        self.total, self.batch, self.rank, self.world = total, batch, rank, world
        self.first_micro_step = 0

    def __iter__(self) -> Iterator[int]:
        for micro in range(self.first_micro_step, self.total // (self.batch * self.world)):
            start = (micro * self.world + self.rank) * self.batch
            yield from range(start, start + self.batch)

    def __len__(self) -> int:
        return (self.total // (self.batch * self.world) - self.first_micro_step) * self.batch


def samples_per_epoch(s: Settings) -> int:
    return s.steps_per_epoch * s.grad_accumulation_steps * s.batch_size * distributed.world_size()


def _leave_signals_to_the_rank(_: int) -> None:
    """In a data worker: launchers and terminals signal every process, and a rank without workers
    could not end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))


def make_loader(
    data: TrainMixture, processor: CoresProcessor, s: Settings
) -> tuple[DataLoader, RankSampler]:
    sampler = RankSampler(len(data), s.batch_size, distributed.rank(), distributed.world_size())
    policy = "skip" if s.on_bad_sample == "skip" else "raise"

    def build(samples: list) -> Batch:
        return collate(
            samples, processor, processor.levels, processor.conversation, on_too_long=policy
        )

    loader = DataLoader(
        data,
        s.batch_size,
        sampler=sampler,
        num_workers=s.workers,
        collate_fn=build,
        persistent_workers=s.workers > 0,
        prefetch_factor=4 if s.workers else None,
        worker_init_fn=_leave_signals_to_the_rank,
        # the loader's own seed must not come from the global generator: a resumed epoch would draw
        # it once more
        generator=torch.Generator().manual_seed(s.seed),
    )
    return loader, sampler

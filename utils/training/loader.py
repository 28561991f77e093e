"""Batches for every rank: which samples it reads, in which order, by which processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from cores.dataset.collate import Batch, collate
from cores.dataset.mixture import TrainMixture
from cores.model.processor import CoresProcessor
from cores.utils import distributed
from cores.utils.settings.arguments import Settings

WORKER_GRACE = 60  # seconds that a data worker outlives SIGTERM, so that its rank can save
# Seconds without a batch after which a data worker is taken to hang. A slow disk needs seconds for
# a batch, and a worker that builds the index of a file of many gigabytes again some minutes.
STUCK_AFTER = 1800


class RankSampler(Sampler[int]):
    """Indices of one rank: a micro step takes ``world`` consecutive groups of ``batch`` samples, a
    group for each rank. So a step has the same samples however many ranks share its total batch.

    ``first_micro_step``: where a resumed epoch begins.
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
    """Of all ranks together."""
    return s.steps_per_epoch * s.grad_accumulation_steps * s.batch_size * distributed.world_size()


def _outlive_stop_signals(_: int) -> None:
    """Starts a data worker. Launchers and terminals signal every process, but a rank whose workers
    are gone could not end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # its rank's handler was inherited
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))


def batches_of(loader: DataLoader) -> Iterator[Batch]:
    """The batches of an epoch. Raises RuntimeError where a data worker has died, or gives no batch
    for STUCK_AFTER seconds.

    The loader's own ``timeout`` is not used: while it waits for that, it does not look whether its
    workers are alive.
    """
    if not loader.num_workers:
        yield from loader
        return

    def stuck(*_: object) -> None:
        raise RuntimeError(f"DataLoader timed out after {STUCK_AFTER} seconds")

    iterator = None
    while True:
        before = signal.signal(signal.SIGALRM, stuck)
        signal.alarm(STUCK_AFTER)
        try:
            iterator = iterator or iter(loader)
            batch = next(iterator)
        except StopIteration:
            return
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        yield batch


def make_loader(
    data: TrainMixture, processor: CoresProcessor, s: Settings
) -> tuple[DataLoader, RankSampler]:
    """Batches of this rank, and the sampler that decides where an epoch begins."""
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
        worker_init_fn=_outlive_stop_signals,
        # The loader draws a seed per epoch. From the global generator, a resumed epoch would draw
        # it a second time, and dropout would go on differently.
        generator=torch.Generator().manual_seed(s.seed),
    )
    return loader, sampler

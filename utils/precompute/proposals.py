"""Computes SAM's proposals of the images that a run will see, for --method llm_seg and
cores+select.

    python -m utils.precompute_proposals --config configs/tiny-llm-seg.yaml
    python -m utils.precompute_proposals --config configs/llm-seg-7b.yaml --jobs 8 --ranks 8 \\
        --dataset_dir ./dataset_dir

Give it the flags of the run. What a run draws is a function of its seed, so the images are known:
those of every epoch, and the evaluation set. One file per image goes into the store (--proposals),
named by its pixels; what is there is not computed again, so a stopped command continues where it
stopped, and runs share their images. At the end it prints what the best possible selection would
score on the evaluation set.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.queues import Queue

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from cores.dataset import command
from cores.dataset.proposals import Found, ProposalSource, ProposalStore
from cores.model.checkpoints.sam import load_sam
from cores.model.config import ProposalConfig
from cores.model.cores import CoresForReasoningSegmentation
from cores.model.selecting.proposals import make_generator, proposals_fingerprint
from cores.utils import build, distributed
from cores.utils.evaluation.oracle import score_oracles
from cores.utils.report.tables import format_table
from cores.utils.settings.arguments import Settings
from cores.utils.settings.programs import read_proposals
from cores.utils.training.loader import samples_per_epoch


class RunImages(Dataset):
    """Every image that the run draws, in its order, then every image of the evaluation set."""

    def __init__(self, s: Settings, ranks: int):
        prompt = build.prompt_format(s)
        self.mixture = build.build_mixture(s, prompt)
        self.mixture.samples_per_epoch = samples_per_epoch(s) // distributed.world_size() * ranks
        self.val = None if s.no_eval else build.build_eval(s, prompt)
        self.epochs = range(s.start_epoch, s.epochs)

    def __len__(self) -> int:
        return len(self.epochs) * len(self.mixture) + (0 if self.val is None else len(self.val))

    def __getitem__(self, index: int) -> np.ndarray | None:
        """uint8 (H, W, 3) RGB, or None for a sample without targets, which needs no proposals."""
        epoch, draw = divmod(index, len(self.mixture))
        if epoch < len(self.epochs):
            self.mixture.set_epoch(self.epochs[epoch])
            sample = self.mixture[draw]
        else:
            assert self.val is not None, f"index {index} is beyond the last epoch"
            sample = self.val[index - len(self.epochs) * len(self.mixture)]
        return sample.image if any(len(c.masks) for c in sample.conversations) else None


# Of this process, set by start_worker: the images, where their proposals are kept, what makes them;
# or why there are none. A pool tells nobody what happened while its processes started.
_worker: tuple[RunImages, ProposalStore, Callable[[np.ndarray], Found]] | Exception | None = None


def load_source(s: Settings, device: str = "cpu") -> ProposalSource:
    """Store and generator of the SAM of --vision_pretrained, or of a merged model, in float32 as
    proposals need it."""
    source = build.open_version(s)
    if source.finished:
        model = CoresForReasoningSegmentation.from_pretrained(source, dtype=torch.float32)
        return nn.Module.to(model, device).eval().proposal_source(s.proposals)
    sam, fields = load_sam(s.vision_pretrained)[0].to(device).eval(), build.selector_config(s)
    assert fields is not None, "read_arguments refuses a method that selects nothing"
    config = ProposalConfig(**fields["proposals"])
    store = ProposalStore(s.proposals, proposals_fingerprint(sam, config))
    return ProposalSource(
        fields["ranking"], fields["count"], fields["pool_size"], store, make_generator(sam, config)
    )


def start_worker(s: Settings, ranks: int, numbers: Queue[int]) -> None:
    """Loads data and SAM, once per process; each process takes one of ``numbers``. A worker whose
    parent has ended, even by SIGKILL, ends itself."""
    global _worker
    if (parent := multiprocessing.parent_process()) is not None:

        def end_with_parent() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    devices = torch.cuda.device_count()
    number = numbers.get()
    try:
        source = load_source(s, f"cuda:{number % devices}" if devices else "cpu")
        assert source.store is not None and source.generate is not None, "load_source sets both"
        _worker = RunImages(s, ranks), source.store, source.generate
    except (ValueError, OSError) as error:
        _worker = error


def compute_image(index: int) -> str:
    """What happened to the image: "computed", "there" already, or "not needed"."""
    assert _worker is not None, "start_worker comes first"
    if isinstance(_worker, Exception):
        raise _worker
    images, store, generate = _worker
    image = images[index]
    if image is None:
        return "not needed"
    if store.read_or_none(image) is not None:
        return "there"
    store.write(image, generate(image))
    return "computed"


def compute_all(s: Settings, ranks: int, jobs: int, total: int) -> Iterator[str]:
    """``compute_image`` of every index below ``total``, in ``jobs`` processes."""
    # A forked process could use neither a GPU nor torch's threads.
    context = multiprocessing.get_context("spawn")
    numbers: Queue[int] = context.Queue()
    for number in range(jobs):
        numbers.put(number)
    if jobs == 1:
        start_worker(s, ranks, numbers)
        yield from map(compute_image, range(total))
        return
    pool = ProcessPoolExecutor(jobs, context, start_worker, (s, ranks, numbers))
    try:
        yield from pool.map(compute_image, range(total), chunksize=4)
    finally:  # Stopped or failed, the command need not wait for what is still in the queue.
        pool.shutdown(cancel_futures=True)


@command.entry(
    stopped="stopped; the same command goes on from here",
    memory="lower --jobs, each of which holds a SAM",
)
def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 with one line for a mistake in flags or files; 4 when a process was killed;
    130 when interrupted."""
    own, s = read_proposals(argv)
    images = RunImages(s, own.ranks)  # reports a wrong path once, before any process starts
    counts = {"computed": 0, "there": 0, "not needed": 0}
    with tqdm(total=len(images), unit="image") as bar:
        for result in compute_all(s, own.ranks, own.jobs, len(images)):
            counts[result] += 1
            bar.update()
            bar.set_postfix(counts, refresh=False)
    source = load_source(s)
    assert source.store is not None, "load_source sets it"
    shown = ", ".join(f"{count} {what}" for what, count in counts.items())
    print(f"{source.store.folder}: {shown}")
    if images.val is not None:
        print(f"{s.val_dataset}, the best that a selection can reach, percent [95 % interval]")
        print(format_table(score_oracles(images.val, source, s.seed)))
    return 0

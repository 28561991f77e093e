"""The training loop under DeepSpeed."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cores.dataset.collate import Batch
from cores.dataset.mixture import TrainMixture
from cores.model.checkpoints.precision import DTYPES
from cores.model.cores import CoresForReasoningSegmentation
from cores.model.processor import CoresProcessor
from cores.utils import distributed
from cores.utils.settings.arguments import Settings
from cores.utils.settings.saved import COPY
from cores.utils.training import checkpoint, normalisation
from cores.utils.training.deepspeed import make_engine
from cores.utils.training.failures import (
    Interrupted,
    StopSignals,
    explained,
    names_of_all_ranks,
    refuse_non_finite_gradient,
    refuse_non_finite_loss,
    refuse_without_targets,
)
from cores.utils.training.loader import batches_of, make_loader
from cores.utils.training.log import RunLog
from cores.utils.training.trackers import Trackers
from cores.utils.training.verify import read_progress

logger = logging.getLogger(__name__)

# A loss is compared with the median of at most so many losses before it, once there are so few.
SPIKE_WINDOW, SPIKE_MINIMUM = 50, 10


class Trainer:
    """Trains, validates and saves.

    ``evaluate``: gets the number of epochs done and returns scores, fractions, "giou" among them,
    which decides what becomes ``ckpt/best``. None trains without validation. ``notes``: further
    JSON objects for the checkpoints, by the names of their files.
    """

    def __init__(
        self,
        model: CoresForReasoningSegmentation,
        processor: CoresProcessor,
        data: TrainMixture,
        settings: Settings,
        evaluate: Callable[[int], dict[str, Any]] | None,
        notes: dict[str, dict[str, Any]] | None = None,
    ):
        self.s, self.data, self.evaluate = settings, data, evaluate
        self.notes = {COPY: settings.saved()} | (notes or {})
        self.engine = make_engine(model, settings)
        self.loader, self.sampler = make_loader(data, processor, settings)
        self.last, self.best = (settings.run_dir / "ckpt" / name for name in ("last", "best"))
        world = distributed.world_size()
        self.images_per_step = settings.batch_size * settings.grad_accumulation_steps * world
        self.progress: dict[str, Any] = {
            "epoch": settings.start_epoch,
            "step": 0,
            "best": None,  # the highest gIoU of a validation, and the step it was measured at
            "best_step": None,
            "recent": [],  # the last losses, for --spike_factor
            "world_size": world,
            "images_per_step": self.images_per_step,
        }
        self.stop = StopSignals()
        self.samples: list[dict] = []  # which samples this rank has in the current step
        self.log: RunLog | None = None  # only the main rank has one

    @property
    def global_step(self) -> int:
        return self.progress["epoch"] * self.s.steps_per_epoch + self.progress["step"]

    def train(self, trackers: Trackers | None = None) -> None:
        """All remaining epochs, reported to the run log and ``trackers``.

        Raises Interrupted after SIGTERM or SIGINT, when the state is saved; NonFiniteLoss;
        ProcessLost; MemoryRanOut; OSError for a full disk.
        """
        try:
            with self.stop:
                if distributed.is_main():
                    # The checkpoint at the end of an epoch is older than the epoch's validation,
                    # so a run that goes on from it validates again.
                    validated = self.global_step - (self.progress["step"] == self.s.steps_per_epoch)
                    done = {"train": self.global_step, "val": validated}
                    self.log = RunLog(self.s.run_dir, done, trackers)
                while self.progress["epoch"] < self.s.epochs:
                    if self.progress["step"] < self.s.steps_per_epoch:
                        self._train_epoch()
                    self._end_epoch()
        except (Interrupted, RuntimeError, MemoryError) as error:
            raise explained(error, self.s, self.global_step, self.last) from error
        finally:
            if self.log:
                self.log.close()

    def _train_epoch(self) -> None:
        s, done = self.s, self.progress["step"]
        self.engine.train()
        self.data.set_epoch(self.progress["epoch"])
        self.sampler.first_micro_step = done * s.grad_accumulation_steps
        batches = batches_of(self.loader)
        quiet = not distributed.is_main()
        # The bar is that of the whole run, and so is the time left.
        bar = tqdm(
            desc=f"epoch {self.progress['epoch'] + 1}/{s.epochs}",
            total=s.epochs * s.steps_per_epoch,
            initial=self.global_step,
            unit="step",
            disable=quiet,
        )
        with bar:
            while self.progress["step"] < s.steps_per_epoch:
                started = time.perf_counter()
                losses = self._step(batches)
                self.progress["step"] += 1
                self._report(bar, losses, time.perf_counter() - started)
                if self.progress["step"] == s.steps_per_epoch:
                    break  # _end_epoch saves.
                saved = bool(s.save_every) and self.progress["step"] % s.save_every == 0
                if saved:
                    self._save()
                if distributed.any_true(self.stop.asked):
                    if not saved:
                        self._save()
                    raise Interrupted

    def _step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One optimizer step over its micro steps. Returns the losses, means over all ranks, and
        "lr", the learning rate it used."""
        lr = self.engine.get_lr()[0]
        sums: dict[str, float] = {}
        micro_batches = [next(batches) for _ in range(self.s.grad_accumulation_steps)]
        self.samples = [info for batch in micro_batches for info in batch.info]
        refuse_without_targets(micro_batches, self.s)
        for factor in normalisation.factors(micro_batches, self.s.loss_normalisation):
            # Popped, so that a batch leaves the device before the next one comes to it.
            batch = micro_batches.pop(0).to(distributed.device(), DTYPES[self.s.precision])
            losses = normalisation.scaled(self.engine(batch).losses, factor)
            loss = self.engine.module.objective.total(losses)
            values = {k: float(v.detach()) for k, v in ({"loss": loss} | losses).items()}
            refuse_non_finite_loss(values, batch.info)
            self.engine.backward(loss)
            self.engine.step()
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value / self.s.grad_accumulation_steps
        if self.s.precision != "fp16":  # Its loss scaling leaves out steps that overflow.
            refuse_non_finite_gradient(self.engine, self.samples)
        return distributed.mean(sums) | {"lr": lr}

    def _report(self, bar: tqdm, losses: dict[str, float], seconds: float) -> None:
        """Shows a step, and logs it if it is one of --print_freq, the last of its epoch or a
        spike. Every rank calls it."""
        spike = self._spike(losses["loss"])
        bar.update()
        if not self.log:
            return
        rate = self.images_per_step / seconds
        shown = {name: f"{value:.3f}" for name, value in losses.items() if name != "lr"}
        bar.set_postfix(shown | {"samples/s": f"{rate:.1f}"}, refresh=False)
        ends_epoch = self.progress["step"] == self.s.steps_per_epoch
        if spike or ends_epoch or self.global_step % self.s.print_freq == 0:
            row = {"step": self.global_step, "epoch": self.progress["epoch"], **losses}
            norm = self.engine.get_global_grad_norm()
            if norm is not None and math.isfinite(norm):
                row["grad_norm"] = float(norm)
            self.log.write(row | {"samples_per_second": rate} | spike, "train")

    def _spike(self, loss: float) -> dict[str, Any]:
        """What the log says about a loss far above those before it, {} for any other. Every rank
        calls it with the same ``loss``."""
        if not self.s.spike_factor:
            return {}
        recent = self.progress["recent"]
        median = statistics.median(recent) if len(recent) >= SPIKE_MINIMUM else math.inf
        self.progress["recent"] = [*recent, loss][-SPIKE_WINDOW:]
        if loss <= self.s.spike_factor * median:
            return {}
        samples = names_of_all_ranks(self.samples)
        if distributed.is_main():
            words = "step %d: loss %.3f, the median before it is %.3f: %s"
            logger.warning(words, self.global_step, loss, median, ", ".join(samples))
        return {"median": median, "samples": samples}

    def _end_epoch(self) -> None:
        """Saves before it validates: a run that is stopped or dies in a validation, which may take
        hours, goes on with that validation."""
        done = self.progress["epoch"] + 1
        validates = done % self.s.eval_every == 0 or done == self.s.epochs
        if self.evaluate is not None and validates:
            self._save()
            self.stop.raise_if_asked()
            self._validate(self.evaluate)
        else:
            self._next_epoch()
            if self.evaluate is None:
                self.progress["best_step"] = self.global_step
            self._save()
            if self.evaluate is None:
                checkpoint.copy(self.last, self.best)
        self.stop.raise_if_asked()

    def _validate(self, evaluate: Callable[[int], dict[str, Any]]) -> None:
        """Scores the state in ``last``, which becomes ``best`` if it is."""
        self.engine.eval()
        done = self.progress["epoch"] + 1
        devices = [distributed.device()] if torch.cuda.is_available() else []
        self.stop.at_once = True  # The state is saved.
        try:
            # Training draws the same numbers with and without validation.
            with torch.random.fork_rng(devices):
                scores = evaluate(done)
        finally:
            self.stop.at_once = False
        if self.log:
            self.log.write({"step": self.global_step, "epoch": done, **scores}, "val")
            self.log.sync()
        self._next_epoch()
        better = self.progress["best"] is None or scores["giou"] > self.progress["best"]
        if better:
            self.progress |= {"best": scores["giou"], "best_step": self.global_step}
        checkpoint.write_progress(self.last, self.progress)
        if better:
            checkpoint.copy(self.last, self.best)

    def _next_epoch(self) -> None:
        self.progress |= {"epoch": self.progress["epoch"] + 1, "step": 0}

    def _save(self) -> None:
        if self.log:
            self.log.sync()  # A checkpoint must not know of steps that the log has lost.
        checkpoint.save(self.engine, self.last, self.progress, self.notes)

    def resume(self, folder: Path) -> None:
        """Continues from the checkpoint ``folder``."""
        saved = checkpoint.load(self.engine, folder)
        self.progress |= saved | {"world_size": distributed.world_size()}
        if not self.best.is_dir() and self.progress["best_step"] != self.global_step:
            # Its score says nothing of the validations to come.
            self.progress |= {"best": None, "best_step": None}
        # A kill between saving the best state and copying it left the copy to be made here.
        is_best = self.progress["best_step"] == self.global_step
        if is_best and read_progress(self.best) != read_progress(folder):
            checkpoint.copy(folder, self.best)

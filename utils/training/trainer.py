"""Training under DeepSpeed: a loop that fits on a screen, and what it needs."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dataset.collate import Batch
from dataset.mixture import TrainMixture
from model.cores import CoresForReasoningSegmentation
from model.processor import CoresProcessor
from utils import distributed
from utils.settings.arguments import Settings
from utils.settings.flags import UsageError
from utils.training import checkpoint, normalisation
from utils.training.deepspeed import DTYPES, make_engine
from utils.training.loader import make_loader
from utils.training.log import RunLog

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


class NonFiniteLoss(RuntimeError):
    """The loss or a gradient is not a number; nothing was saved of that step."""


class Lost(RuntimeError):
    """A data worker or another rank died; the last checkpoint is intact."""


# steps whose median a loss is compared with; fewer say nothing
SPIKE_WINDOW, SPIKE_MINIMUM = 50, 10


RANK_GONE = (
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "gloo",
    "NCCL",
    "Timed out waiting",
    "Socket Timeout",
)


# --------------------------------------------------------------------------------------------- loop


class Trainer:
    """Trains, validates and saves. ``evaluate`` gets the epoch and returns a report's summary, or
    is None."""

    def __init__(
        self,
        model: CoresForReasoningSegmentation,
        processor: CoresProcessor,
        data: TrainMixture,
        settings: Settings,
        evaluate: Callable[[int], dict[str, Any]] | None,
    ):
        self.s, self.data, self.evaluate = settings, data, evaluate
        self.engine = make_engine(model, settings)
        self.loader, self.sampler = make_loader(data, processor, settings)
        self.run = settings.run_dir
        self.progress: dict[str, Any] = {
            "epoch": settings.start_epoch,
            "step": 0,
            "best": None,
            "best_step": None,
            "recent": [],  # the last losses, for --spike_factor
            "world_size": distributed.world_size(),
            "images_per_step": (
                settings.batch_size * settings.grad_accumulation_steps * distributed.world_size()
            ),
        }
        self.stop = self.validating = False
        self.seen: list[dict] = []  # the samples of the step under way, of this rank
        self.log: RunLog | None = None

    @property
    def global_step(self) -> int:
        return self.progress["epoch"] * self.s.steps_per_epoch + self.progress["step"]

    @property
    def last(self) -> Path:
        return self.run / "ckpt" / "last"

    def resume(self, folder: Path) -> None:
        self.progress |= checkpoint.load(self.engine, folder) | {
            "world_size": distributed.world_size()
        }
        best = self.run / "ckpt" / "best"
        if self.progress["best_step"] == self.global_step and checkpoint.read_progress(
            best
        ) != checkpoint.read_progress(folder):
            checkpoint.copy(folder, best)  # a kill came between the save and its copy

    def train(self) -> None:
        """All remaining epochs.

        Raises Interrupted after SIGTERM or SIGINT, when the state is saved; NonFiniteLoss; Lost;
        OSError for a full disk.
        """
        previous = {
            sig: signal.signal(sig, self._ask_to_stop) for sig in (signal.SIGTERM, signal.SIGINT)
        }
        if distributed.is_main():
            validated = self.global_step - (self.progress["step"] == self.s.steps_per_epoch)
            self.log = RunLog(self.run, {"train": self.global_step, "val": validated})
        try:
            while self.progress["epoch"] < self.s.epochs:
                if self.progress["step"] < self.s.steps_per_epoch:
                    self._train_epoch()
                self._end_epoch()
        except RuntimeError as error:
            raise self._explained(error) from error
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)
            if self.log:
                self.log.close()

    def _end_epoch(self) -> None:
        """Saves, then validates: whatever happens to a validation, it starts again from here."""
        if self._validation_is_due():
            self._save()
            self._stop_if_asked()
            self._validate()
        else:
            self._next_epoch()
            if self.evaluate is None:
                self.progress["best_step"] = self.global_step
            self._save()
            if self.evaluate is None:
                checkpoint.copy(self.last, self.run / "ckpt" / "best")
        self._stop_if_asked()

    def _next_epoch(self) -> None:
        self.progress |= {"epoch": self.progress["epoch"] + 1, "step": 0}

    def _train_epoch(self) -> None:
        s, engine = self.s, self.engine
        engine.train()
        self.data.set_epoch(self.progress["epoch"])
        self.sampler.first_micro_step = self.progress["step"] * s.grad_accumulation_steps
        batches = self._noted(iter(self.loader))
        label = f"epoch {self.progress['epoch'] + 1}/{s.epochs}"
        bar = tqdm(
            total=s.steps_per_epoch,
            initial=self.progress["step"],
            desc=label,
            unit="step",
            disable=not distributed.is_main(),
        )
        with bar:
            while self.progress["step"] < s.steps_per_epoch:
                started = time.perf_counter()
                self.seen.clear()
                parts = self._step(batches)
                self.progress["step"] += 1
                seconds = time.perf_counter() - started
                self._report(bar, parts, seconds)
                if self.progress["step"] == s.steps_per_epoch:
                    break  # saved by the end of the epoch
                saved = bool(s.save_every) and self.progress["step"] % s.save_every == 0
                if saved:
                    self._save()
                if distributed.any_true(self.stop):
                    if not saved:
                        self._save()
                    self._interrupt()

    def _noted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.seen += batch.info
            yield batch

    def _names(self, infos: list[dict]) -> str:
        """The samples of all ranks. Every rank calls it."""
        return ", ".join(
            sorted(
                set(distributed.gather_lists([f"{info['dataset']} {info['id']}" for info in infos]))
            )
        )

    def _step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One optimizer step over its micro steps; each loss of all ranks together."""
        sums: dict[str, float] = {}
        used_lr = self.engine.get_lr()[0]
        held = [next(batches) for _ in range(self.s.grad_accumulation_steps)]
        self._refuse_lone_fetches(held)
        for factor in normalisation.factors(held, self.s.loss_normalisation):
            batch = held.pop(0).to(distributed.device(), DTYPES[self.s.precision])
            parts = normalisation.scaled(self.engine(batch).losses, factor)
            loss = self.engine.module.objective.total(parts)
            values = {
                name: float(value.detach()) for name, value in ({"loss": loss} | parts).items()
            }
            self._refuse_non_finite(values, batch)
            self.engine.backward(loss)
            self.engine.step()
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value / self.s.grad_accumulation_steps
        self._refuse_non_finite_gradient()
        return distributed.mean(sums) | {"lr": used_lr}

    def _refuse_lone_fetches(self, batches: list[Batch]) -> None:
        """ZeRO-3 fetches weights with all ranks at once: one without targets does not ask for
        SAM's, and all would wait."""
        if self.s.zero_stage == 3 and distributed.world_size() > 1:
            without = next((batch for batch in batches if not normalisation.counts(batch)[1]), None)
            if without is not None:
                info = without.info[0]
                raise UsageError(
                    f"{info['dataset']} {info['id']}: a micro batch without targets, which"
                    " --zero_stage 3 on several ranks cannot train on; use --zero_stage 2, or data"
                    " with targets only"
                )

    def _refuse_non_finite(self, values: dict[str, float], batch: Batch) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if distributed.any_true(bool(bad)):
            parts, names = (
                sorted(set(distributed.gather_lists(bad))),
                self._names(batch.info if bad else []),
            )
            raise NonFiniteLoss(
                f"step {self.global_step + 1}: {', '.join(parts)} is not finite; samples: {names}."
                f" Nothing was updated; {self._where_to_go_on()}"
            )

    def _refuse_non_finite_gradient(self) -> None:
        # the same on every rank; None where the engine does not know it
        norm = self.engine.get_global_grad_norm()
        if norm is None:  # then the weights tell, which are the same on every rank, too
            sound = all(
                bool(p.isfinite().all()) for p in self.engine.module.parameters() if p.requires_grad
            )
        else:
            sound = math.isfinite(norm)
        if self.s.precision != "fp16" and not sound:  # fp16 has loss scaling for this
            raise NonFiniteLoss(
                f"step {self.global_step + 1}: the gradient is not finite although the loss is;"
                f" samples of the step: {self._names(self.seen)}. Nothing was saved of this step;"
                f" {self._where_to_go_on()}"
            )

    def _where_to_go_on(self) -> str:
        saved = checkpoint.read_progress(self.last)
        if saved is None:
            return "there is no checkpoint yet"
        step = saved["epoch"] * self.s.steps_per_epoch + saved["step"]
        return (
            f"the last checkpoint, of step {step}, is in {self.last}, and the same command"
            " continues from it"
        )

    def _explained(self, error: RuntimeError) -> RuntimeError:
        """What a user can do about an error that says nothing to him."""
        if isinstance(error, NonFiniteLoss):
            return error
        text = " ".join(str(error).split())
        if "DataLoader worker" in text and "Traceback" not in text:
            s = self.s
            return Lost(
                f"step {self.global_step + 1}: {text}; the system kills the largest process when"
                f" memory runs out: lower --workers (now {s.workers}) or --batch_size (now"
                f" {s.batch_size}); {self._where_to_go_on()}"
            )
        if distributed.world_size() > 1 and any(sign in text for sign in RANK_GONE):
            return Lost(
                f"step {self.global_step + 1}, rank {distributed.rank()}: another rank is gone, see"
                f" its own last words ({text[:200]}); {self._where_to_go_on()}"
            )
        return error

    def _report(self, bar: tqdm, parts: dict[str, float], seconds: float) -> None:
        samples = self.s.batch_size * self.s.grad_accumulation_steps * distributed.world_size()
        last = self.progress["step"] == self.s.steps_per_epoch
        due = self.global_step % self.s.print_freq == 0 or last
        spike = self._spike(parts["loss"])
        bar.update()
        if not self.log:
            return
        shown = {name: f"{value:.3f}" for name, value in parts.items() if name != "lr"}
        bar.set_postfix(shown | {"samples/s": f"{samples / seconds:.1f}"}, refresh=False)
        if due or spike:
            norm = self.engine.get_global_grad_norm()
            row = {"step": self.global_step, "epoch": self.progress["epoch"], **parts}
            row |= {"grad_norm": float(norm)} if norm is not None and math.isfinite(norm) else {}
            self.log.write(row | {"samples_per_second": samples / seconds} | spike, "train")

    def _spike(self, loss: float) -> dict[str, Any]:
        """What the log says about a loss far above those before it; every rank gets the same
        ``loss``."""
        if not self.s.spike_factor:
            return {}
        recent = self.progress["recent"]
        median = statistics.median(recent) if len(recent) >= SPIKE_MINIMUM else math.inf
        self.progress["recent"] = [*recent, loss][-SPIKE_WINDOW:]
        if loss <= self.s.spike_factor * median:
            return {}
        names = self._names(self.seen)
        if distributed.is_main():
            logger.warning(
                "step %d: loss %.3f, the median before it is %.3f: %s",
                self.global_step,
                loss,
                median,
                names,
            )
        return {"median": median, "samples": names.split(", ")}

    def _validation_is_due(self) -> bool:
        after = self.progress["epoch"] + 1
        return self.evaluate is not None and (
            after % self.s.eval_every == 0 or after >= self.s.epochs
        )

    def _validate(self) -> None:
        """Scores the state in ``last``; the best so far becomes ``best``. Training draws the same
        numbers with and without."""
        self.engine.eval()
        devices = [distributed.device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices), self._stop_at_once():
            summary = self.evaluate(self.progress["epoch"] + 1)
        if self.log:
            self.log.write(
                {"step": self.global_step, "epoch": self.progress["epoch"] + 1, **summary}, "val"
            )
            self.log.sync()
        self._next_epoch()
        better = self.progress["best"] is None or summary["giou"] > self.progress["best"]
        if better:
            self.progress |= {"best": summary["giou"], "best_step": self.global_step}
        checkpoint.write_progress(self.last, self.progress)
        if better:
            checkpoint.copy(self.last, self.run / "ckpt" / "best")

    @contextlib.contextmanager
    def _stop_at_once(self) -> Iterator[None]:
        """Nothing is lost by leaving this block, which may take hours."""
        self.validating = True
        try:
            yield
        finally:
            self.validating = False

    def _stop_if_asked(self) -> None:
        if distributed.any_true(self.stop):
            self._interrupt()

    def _interrupt(self) -> None:
        raise Interrupted(
            f"stopped at step {self.global_step}; the same command continues from"
            f" {self.run / 'ckpt' / 'last'}"
        )

    def _save(self) -> None:
        if self.log:
            self.log.sync()  # a checkpoint must not know of steps that the log has lost
        checkpoint.save(self.engine, self.last, self.progress)

    def _ask_to_stop(self, number: int, _: Any) -> None:
        if not self.stop and distributed.is_main():  # print may be what was interrupted
            os.write(
                2,
                f"\n{signal.Signals(number).name}: stopping as soon as the state is saved\n".encode(),
            )
        self.stop = True
        if self.validating:
            self._interrupt()

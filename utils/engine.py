"""Training under DeepSpeed: a loop that fits on a screen, and what it needs."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from dataset.mixture import TrainMixture
from dataset.sample import Batch, collate
from model.cores import CoresForReasoningSegmentation
from model.processor import CoresProcessor
from utils import checkpoint, distributed, normalisation
from utils.arguments import Settings, UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


class NonFiniteLoss(RuntimeError):
    """The loss is not a number; nothing was updated with it."""


# -------------------------------------------------------------------------------------------------------------- set-up


def deepspeed_config(s: Settings) -> dict[str, Any]:
    # the optimizer is torch's own AdamW wherever it runs: DeepSpeed's would have to be compiled on the user's machine
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}} if s.offload == "optimizer" else {}
    return {
        "train_micro_batch_size_per_gpu": s.batch_size,
        "gradient_accumulation_steps": s.grad_accumulation_steps,
        "gradient_clipping": s.max_grad_norm,
        "bf16": {"enabled": s.precision == "bf16"},
        "fp16": {"enabled": s.precision == "fp16"},
        "zero_optimization": {
            "stage": s.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": torch.cuda.is_available(),
            **offload,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def learning_rate_factor(s: Settings) -> Callable[[int], float]:
    """Linear warm-up to 1, then linear decay to 0 at the last step. A run with --start_epoch enters it there."""
    total, skipped = s.epochs * s.steps_per_epoch, s.start_epoch * s.steps_per_epoch

    def factor(step: int) -> float:
        step += skipped
        if step < s.warmup_steps:
            return (step + 1) / s.warmup_steps
        return max(0.0, (total - step) / max(1, total - s.warmup_steps))

    return factor


def make_engine(model: CoresForReasoningSegmentation, s: Settings):
    """The DeepSpeed engine around the trainable weights."""
    import deepspeed

    if not torch.cuda.is_available():  # gloo serves; this extension would need a C++ compiler at run time
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=s.lr, betas=(s.beta1, s.beta2), weight_decay=s.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(s))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, model_parameters=trainable, lr_scheduler=schedule, config=deepspeed_config(s)
    )
    return engine


class RankSampler(Sampler[int]):
    """Indices of one rank: a step takes ``world`` consecutive groups of ``batch`` samples, one for each rank.

    The samples of a step are therefore the same for any number of ranks that gives the same total batch.
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


def make_loader(data: TrainMixture, processor: CoresProcessor, s: Settings) -> tuple[DataLoader, RankSampler]:
    sampler = RankSampler(len(data), s.batch_size, distributed.rank(), distributed.world_size())
    policy = "skip" if s.on_bad_sample == "skip" else "raise"

    def build(samples: list) -> Batch:
        return collate(samples, processor, processor.levels, processor.conversation, on_too_long=policy)

    loader = DataLoader(
        data, s.batch_size, sampler=sampler, num_workers=s.workers, collate_fn=build, persistent_workers=s.workers > 0,
        prefetch_factor=4 if s.workers else None,
        # the loader's own seed must not come from the global generator: a resumed epoch would draw it once more
        generator=torch.Generator().manual_seed(s.seed),
    )  # fmt: skip
    return loader, sampler


# ---------------------------------------------------------------------------------------------------------------- loop


class Trainer:
    """Trains, validates and saves. ``evaluate`` gets the epoch and returns a report's summary, or is None."""

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
            "world_size": distributed.world_size(),
        }
        self.stop = False
        self.log = RunLog(self.run) if distributed.is_main() else None

    @property
    def global_step(self) -> int:
        return self.progress["epoch"] * self.s.steps_per_epoch + self.progress["step"]

    def resume(self, folder: Path) -> None:
        self.progress = checkpoint.load(self.engine, folder)

    def train(self) -> None:
        """All remaining epochs. Raises Interrupted after SIGTERM or SIGINT, when the state is saved."""
        previous = {sig: signal.signal(sig, self._ask_to_stop) for sig in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self.progress["epoch"] < self.s.epochs:
                self._train_epoch()
                self.progress |= {"epoch": self.progress["epoch"] + 1, "step": 0}
                better = self._validate()
                self._save()
                if better:
                    checkpoint.copy(self.run / "ckpt" / "last", self.run / "ckpt" / "best")
                if distributed.any_true(self.stop):
                    self._interrupt()
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)
            if self.log:
                self.log.close()

    def _train_epoch(self) -> None:
        s, engine = self.s, self.engine
        engine.train()
        self.data.set_epoch(self.progress["epoch"])
        self.sampler.first_micro_step = self.progress["step"] * s.grad_accumulation_steps
        batches = iter(self.loader)
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
                parts = self._step(batches)
                self.progress["step"] += 1
                seconds = time.perf_counter() - started
                self._report(bar, parts, seconds)
                if self.progress["step"] < s.steps_per_epoch and distributed.any_true(self.stop):
                    self._save()
                    self._interrupt()
                if s.save_every and self.progress["step"] % s.save_every == 0 and self.progress["step"] < s.steps_per_epoch:
                    self._save()

    def _step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One optimizer step over its micro steps; each loss of all ranks together."""
        sums: dict[str, float] = {}
        used_lr = self.engine.get_lr()[0]
        held = [next(batches) for _ in range(self.s.grad_accumulation_steps)]
        self._refuse_lone_fetches(held)
        for factor in normalisation.factors(held, self.s.loss_normalisation):
            batch = held.pop(0).to(distributed.device(), DTYPES[self.s.precision])
            parts = normalisation.scaled(self.engine(batch).losses, factor)
            loss = self.engine.module.total(parts)
            values = {name: float(value.detach()) for name, value in ({"loss": loss} | parts).items()}
            self._refuse_non_finite(values, batch)
            self.engine.backward(loss)
            self.engine.step()
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value / self.s.grad_accumulation_steps
        self._refuse_non_finite_gradient()
        return distributed.mean(sums) | {"lr": used_lr}

    def _refuse_lone_fetches(self, batches: list[Batch]) -> None:
        """ZeRO-3 fetches weights with all ranks at once: one without targets does not ask for SAM's, and all would wait."""
        if self.s.zero_stage == 3 and distributed.world_size() > 1:
            without = next((batch for batch in batches if not normalisation.counts(batch)[1]), None)
            if without is not None:
                info = without.info[0]
                raise UsageError(
                    f"{info['dataset']} {info['id']}: a micro batch without targets, which --zero_stage 3 on several ranks cannot "
                    "train on; use --zero_stage 2, or data with targets only"
                )

    def _refuse_non_finite(self, values: dict[str, float], batch: Batch) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if distributed.any_true(bool(bad)):
            names = sorted({f"{info['dataset']} {info['id']}" for info in batch.info})
            raise NonFiniteLoss(
                f"step {self.global_step + 1}, rank {distributed.rank()}: {', '.join(bad) or 'another rank'} is not "
                f"finite; samples: {', '.join(names)}. Nothing was updated; the last checkpoint is in "
                f"{self.run / 'ckpt' / 'last'}"
            )

    def _refuse_non_finite_gradient(self) -> None:
        norm = self.engine.get_global_grad_norm()  # the same on every rank; None where the engine does not know it
        if self.s.precision != "fp16" and norm is not None and not math.isfinite(norm):  # fp16 has loss scaling for this
            raise NonFiniteLoss(
                f"step {self.global_step + 1}: the gradient is not finite although the loss is; nothing was saved from "
                f"this step, the last checkpoint is in {self.run / 'ckpt' / 'last'}"
            )

    def _report(self, bar: tqdm, parts: dict[str, float], seconds: float) -> None:
        samples = self.s.batch_size * self.s.grad_accumulation_steps * distributed.world_size()
        last = self.progress["step"] == self.s.steps_per_epoch
        due = self.global_step % self.s.print_freq == 0 or last
        bar.update()
        if not self.log:
            return
        shown = {name: f"{value:.3f}" for name, value in parts.items() if name != "lr"}
        bar.set_postfix(shown | {"samples/s": f"{samples / seconds:.1f}"}, refresh=False)
        if due:
            row = {"step": self.global_step, "epoch": self.progress["epoch"], **parts}
            self.log.write(row | {"samples_per_second": samples / seconds}, "train")

    def _validate(self) -> bool:
        """Evaluates when it is due; True for the best score so far, and always if there are no scores."""
        epoch = self.progress["epoch"]
        if self.evaluate is None or (epoch % self.s.eval_every and epoch < self.s.epochs):
            return self.evaluate is None
        self.engine.eval()
        summary = self.evaluate(epoch)
        if self.log:
            self.log.write({"step": self.global_step, "epoch": epoch, **summary}, "val")
        if self.progress["best"] is not None and summary["giou"] <= self.progress["best"]:
            return False
        self.progress["best"] = summary["giou"]
        return True

    def _interrupt(self) -> None:
        raise Interrupted(f"stopped at step {self.global_step}; the same command continues from {self.run / 'ckpt' / 'last'}")

    def _save(self) -> None:
        checkpoint.save(self.engine, self.run / "ckpt" / "last", self.progress)

    def _ask_to_stop(self, *_: Any) -> None:
        self.stop = True


class RunLog:
    """log.jsonl and TensorBoard. Steps never restart; after a resume the curve goes on."""

    def __init__(self, run: Path):
        from torch.utils.tensorboard import SummaryWriter

        run.mkdir(parents=True, exist_ok=True)
        self.stream = (run / "log.jsonl").open("a", encoding="utf-8")
        self.board = SummaryWriter(str(run / "tensorboard"))

    def write(self, row: dict[str, Any], kind: str) -> None:
        self.stream.write(json.dumps({"kind": kind, **row}) + "\n")
        self.stream.flush()
        for name, value in row.items():
            if isinstance(value, (int, float)) and name not in ("step", "epoch"):
                self.board.add_scalar(f"{kind}/{name}", value, row["step"])

    def close(self) -> None:
        self.stream.close()
        self.board.close()

"""What ends a training run early: signals, numbers that are not finite, dead workers and ranks.

Whoever notices raises one of the errors below; ``explained`` adds at which step that was and how to
go on.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
from pathlib import Path
from typing import Any

from cores.dataset import command
from cores.dataset.collate import Batch
from cores.utils import distributed
from cores.utils.distributed import ProcessLost
from cores.utils.settings.arguments import Settings
from cores.utils.settings.flags import UsageError
from cores.utils.training import normalisation
from cores.utils.training.verify import read_progress

LESS_MEMORY = (
    "lower --batch_size (a higher --grad_accumulation_steps makes up for it) or --workers, or use"
    " --load_in_4bit, --offload optimizer or --gradient_checkpointing"
)


class Interrupted(Exception):
    """The run was asked to stop; its state is saved. All ranks stop together, and one says so."""

    exit_code = command.STOPPED

    @property
    def said(self) -> bool:
        return not distributed.is_main()


class NonFiniteLoss(RuntimeError):
    """The loss or a gradient is not a number; nothing was saved of that step. All ranks raise it
    with the same words, and one says them."""

    exit_code = 3

    @property
    def said(self) -> bool:
        return not distributed.is_main()


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP (of a closed terminal; not where ``nohup`` has it ignored) ask the
    run to stop, while this context is entered.

    The loop stops where its state is saved. While ``at_once`` is True a signal raises Interrupted
    wherever the run is.
    """

    def __init__(self) -> None:
        self.asked = self.at_once = False

    def __enter__(self) -> None:
        asked = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
        heard = [number for number in asked if signal.getsignal(number) != signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self._ask) for number in heard}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: Any) -> None:
        if not self.asked and distributed.is_main():
            line = f"\n{signal.Signals(number).name}: stopping as soon as the state is saved\n"
            with contextlib.suppress(OSError):  # The terminal may be gone.
                os.write(2, line.encode())  # The signal may have interrupted a print.
        self.asked = True
        if self.at_once:
            raise Interrupted

    def raise_if_asked(self) -> None:
        """Raises Interrupted on every rank if any of them was asked to stop."""
        if distributed.any_true(self.asked):
            raise Interrupted


def names_of_all_ranks(samples: list[dict]) -> list[str]:
    """Data set and id of the samples of all ranks, from entries of ``Batch.info``. Every rank calls
    it."""
    names = [f"{info['dataset']} {info['id']}" for info in samples]
    return sorted(set(distributed.gather_lists(names)))


def refuse_without_targets(batches: list[Batch], s: Settings) -> None:
    """Raises UsageError for a micro batch without targets under ZeRO-3: that fetches weights on all
    ranks at once, so the others would wait forever for this rank to ask for SAM's."""
    if s.zero_stage < 3 or distributed.world_size() == 1:
        return
    for batch in batches:
        if not normalisation.counts(batch)[1]:
            raise UsageError(
                f"{batch.info[0]['dataset']} {batch.info[0]['id']}: a micro batch without targets,"
                " which --zero_stage 3 on several ranks cannot train on; use --zero_stage 2, or"
                " data with targets only"
            )


def refuse_non_finite_loss(losses: dict[str, float], samples: list[dict]) -> None:
    """Raises NonFiniteLoss before such a loss changes a weight. Every rank calls it."""
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if distributed.any_true(bool(bad)):
        losses_of_all = ", ".join(sorted(set(distributed.gather_lists(bad))))
        names = ", ".join(names_of_all_ranks(samples if bad else []))
        raise NonFiniteLoss(f"{losses_of_all} is not finite; samples: {names}. Nothing was updated")


def refuse_non_finite_gradient(engine, samples: list[dict]) -> None:
    """Raises NonFiniteLoss before the state after such a step is saved. Every rank calls it, and
    all come to the same result."""
    norm = engine.get_global_grad_norm()
    if norm is None:  # Without ZeRO, DeepSpeed does not tell; the updated weights do.
        trained = (p for p in engine.module.parameters() if p.requires_grad)
        finite = all(bool(p.isfinite().all()) for p in trained)
    else:
        finite = math.isfinite(norm)
    if not finite:
        raise NonFiniteLoss(
            "the gradient is not finite although the loss is; samples of the step:"
            f" {', '.join(names_of_all_ranks(samples))}. Nothing was saved of this step"
        )


def explained(error: Exception, s: Settings, step: int, last: Path) -> Exception:
    """``error`` with what a user can do about it; the same error if nothing is known about it.

    ``step``: optimizer steps that the run has done. ``last``: where its last checkpoint would be.
    """
    if isinstance(error, Interrupted):
        return Interrupted(f"stopped at step {step}; the same command continues from {last}")
    where, text = f"step {step + 1}", " ".join(str(error).split())
    kind: type[Exception] = ProcessLost
    if isinstance(error, (NonFiniteLoss, ProcessLost)):
        kind, what = type(error), text
    elif lack := command.out_of_memory(error):
        kind, what = command.MemoryRanOut, f"{lack}; {LESS_MEMORY}"
    elif "DataLoader worker" in text and "Traceback" not in text:
        what = (
            f"{text}; the system kills the largest process when memory runs out: lower --workers"
            f" (now {s.workers}) or --batch_size (now {s.batch_size})"
        )
    elif "DataLoader timed out" in text:
        what = (
            f"{text}: a data worker hangs, on a disk that does not answer say; --workers 0 reads in"
            " the main process and shows where"
        )
    elif distributed.lost_rank(error):
        words = distributed.last_words() or f"see its own last words ({text[:200]})"
        what = f"another rank is gone, {words}"
    else:
        return error
    saved = read_progress(last)
    way_on = "there is no checkpoint yet"
    if saved is not None:
        saved_step = saved["epoch"] * s.steps_per_epoch + saved["step"]
        way_on = (
            f"the last checkpoint, of step {saved_step}, is in {last}, and the same command"
            " continues from it"
        )
    return kind(f"{where}: {what}; {way_on}")

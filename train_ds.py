"""Trains and evaluates CoReS, LISA and their ablations under DeepSpeed; see README for recipes.

    python train_ds.py --config configs/tiny.yaml                         # one process, CPU or GPU
    deepspeed --num_gpus 2 train_ds.py --config configs/cores-7b.yaml --exp_name cores-7b
    python train_ds.py --eval_only --version runs/demo/model --dataset_dir DATA --val_dataset NAME

Everything goes to <log_base_dir>/<exp_name>: config.json, ckpt/, log.jsonl, tensorboard/,
metrics.json, report.html, examples.png.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

from cores.dataset import command
from cores.utils.settings.arguments import Settings, read_resumed, settings_of
from cores.utils.settings.programs import read_training

if __name__ == "__main__":
    command.guard(read_training)

import numpy as np
import torch

from cores.utils import distributed

distributed.prepare_environment()  # This comes before anything that imports deepspeed.

from cores.dataset.files.faults import SKIPPED, read_skip_list  # noqa: E402
from cores.utils import build, identity  # noqa: E402
from cores.utils.evaluation.measuring import final_evaluation, modes_of  # noqa: E402
from cores.utils.evaluation.runner import evaluate, refuse_too_long  # noqa: E402
from cores.utils.settings.flags import UsageError  # noqa: E402
from cores.utils.training import checkpoint, lock, reshard  # noqa: E402
from cores.utils.training.failures import LESS_MEMORY  # noqa: E402
from cores.utils.training.trackers import reporting, require  # noqa: E402
from cores.utils.training.trainer import Trainer  # noqa: E402
from cores.utils.training.verify import read_progress  # noqa: E402


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def print_once(*words: Any) -> None:
    """``print`` on the main rank."""
    if distributed.is_main():
        print(*words, flush=True)


def check_ranks(s: Settings) -> None:
    """Raises UsageError for what this machine or number of ranks cannot do; applies
    --global_batch_size."""
    world = distributed.world_size()
    build.refuse_half_on_cpu(s)
    if s.zero_stage == 3 and world > 1:
        if not (s.no_eval or s.eval_only):
            raise UsageError(
                "--zero_stage 3 on several ranks cannot generate during training; add --no_eval and"
                " use --eval_only later"
            )
        if s.sam_cache:
            raise UsageError(
                "--zero_stage 3: all ranks fetch SAM's weights together, but with --sam_cache only"
                " some ranks ask; leave one out"
            )
        if "vqa" in s.dataset.split("||") and not s.eval_only:
            raise UsageError(
                "--zero_stage 3 on several ranks cannot train on --dataset vqa, which has no"
                " targets; use --zero_stage 2"
            )
    if s.global_batch_size:
        if s.global_batch_size % (s.batch_size * world):
            raise UsageError(
                f"--global_batch_size {s.global_batch_size} is not divisible by {world} ranks × "
                f"--batch_size {s.batch_size}; change one of the three"
            )
        s.grad_accumulation_steps = s.global_batch_size // (s.batch_size * world)


def refuse_mixed_runs(s: Settings) -> None:
    """Raises UsageError on all ranks if they were started for different runs."""
    runs = sorted(set(distributed.gather_lists([s.exp_name])))
    if len(runs) > 1:
        raise UsageError(
            f"ranks of different runs have met, {' and '.join(runs)}: give each run a --master_port"
            " of its own"
        )


def train(s: Settings, started: float) -> None:
    if not hasattr(signal, "alarm"):
        raise UsageError("training needs POSIX (Linux, macOS, WSL): signal.alarm ends its workers")
    require(s)
    with lock.owned(s.run_dir):
        train_here(s, started)


def train_here(s: Settings, started: float) -> None:
    """As ``train``, in a run folder that no other training uses."""
    checkpoint.recover_all(s.run_dir)
    resume_from = find_resume(s)
    if resume_from:
        refuse_other_run(s, resume_from)
    if not resume_from or not resume_from.resolve().is_relative_to(s.run_dir.resolve()):
        # What another run of this name has left out says nothing about this one.
        if distributed.is_main():
            (s.run_dir / SKIPPED).unlink(missing_ok=True)
        distributed.barrier()
    # The data come first, as a wrong path should be known before a model is loaded.
    source = build.open_version(s)
    prompt = build.prompt_format(s, source)
    data = build.build_mixture(s, prompt)
    val = None if s.no_eval else build.build_eval(s, prompt)
    lock.require_writable(s.run_dir)
    made_of = identity.of_run(s, source, data, val)
    if resume_from:
        identity.refuse_changes(resume_from, made_of, s, "going on")
    model, processor = build.build_model(s, source)
    if val is not None:
        mine = range(distributed.rank(), len(val), distributed.world_size())
        refuse_too_long(val, processor, modes_of(s), mine)
    sizes = build.make_trainable(model, s)
    print_once("trainable:", ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    seed_everything(s.seed * 1000 + distributed.rank())

    def validate(epoch: int) -> dict[str, Any]:
        mode = modes_of(s)[0]
        how = {"batch_size": s.val_batch_size, "max_new_tokens": s.max_new_tokens, "seed": s.seed}
        limit, progress = s.eval_limit or None, distributed.is_main()
        report = evaluate(model, processor, val, mode, limit=limit, progress=progress, **how)
        print_once(f"after epoch {epoch}, {mode}: " + report.line())
        return {k: v for k, v in report.summary.items() if isinstance(v, float)}

    notes = {identity.IDENTITY: made_of}
    trainer = Trainer(model, processor, data, s, validate if val is not None else None, notes)
    if resume_from:
        trainer.resume(resume_from)
        print_once(f"continuing from {resume_from}, step {trainer.global_step}")
    if distributed.is_main():
        checkpoint.save_settings(s.run_dir, s)
    with reporting(s, trainer.global_step, resume_from is not None) as trackers:
        trainer.train(trackers)
        skipped = s.run_dir / SKIPPED
        if skipped.is_file():
            count = len(read_skip_list(skipped))
            print_once(f"{count} bad items were left out; {skipped} names them")
        if val is not None:
            # ``best`` is what the merge script exports. ZeRO-3 has taken the weights apart, so that
            # nothing can be loaded into them.
            if s.zero_stage < 3:
                which = "best" if (s.run_dir / "ckpt" / "best").is_dir() else "last"
                checkpoint.load_weights(model, checkpoint.find_checkpoint(s.run_dir, which))
            metrics = final_evaluation(model, processor, val, s, started)
            trackers.final(metrics, {"examples": s.run_dir / "examples.png"})


def refuse_other_run(s: Settings, folder: Path) -> None:
    """Raises UsageError where the run cannot go on from the checkpoint ``folder`` with these
    settings: damaged files, other settings, another number of images in a step."""
    checkpoint.refuse_damaged(folder, s.run_dir)
    if not s.no_eval and s.zero_stage < 3:
        checkpoint.refuse_damaged_best(s.run_dir)
    try:
        earlier = settings_of(read_resumed(s.run_dir))
    except UsageError:
        if not s.accept_changes:
            raise
        earlier = s
    s.refuse_changes(earlier, s.run_dir)
    reshard.refuse(folder, read_progress(folder) or {}, s, earlier)


def find_resume(s: Settings) -> Path | None:
    """The checkpoint to continue from, None for a new run."""
    if s.resume not in ("", "auto"):
        return checkpoint.find_checkpoint(s.resume)
    if s.auto_resume or s.resume:
        try:
            return checkpoint.find_checkpoint(s.run_dir)
        except UsageError:
            checkpoint.refuse_lost(s.run_dir)
    return None


def evaluate_only(s: Settings, started: float) -> None:
    model, processor = build.build_model(s)
    final_evaluation(model, processor, build.build_eval(s, processor), s, started)


@command.entry(stopped="stopped; the same command continues", memory=LESS_MEMORY)
def main(argv: list[str] | None = None) -> int:
    """Exit code: 0; 2 for a mistake in flags or files; 3 after a non-finite loss; 4 when a data
    worker or another rank died; 5 when memory ran out; 130 when asked to stop."""
    started = time.time()
    with distributed.joined():
        settings = read_training(argv)
        refuse_mixed_runs(settings)
        check_ranks(settings)
        seed_everything(settings.seed)
        (evaluate_only if settings.eval_only else train)(settings, started)
    return 0


if __name__ == "__main__":
    command.leave(main())

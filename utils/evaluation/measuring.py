"""A model, a run or another system's masks, measured: results on the screen and in files."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cores.dataset import command
from cores.dataset.files.write import prepare_output
from cores.dataset.mixture import EvalDataset
from cores.utils import build, distributed
from cores.utils.evaluation.predictions import Predictions, score_predictions
from cores.utils.evaluation.runner import MODES, evaluate
from cores.utils.evaluation.writer import write_reports
from cores.utils.settings.arguments import Settings, parse, read_resumed
from cores.utils.settings.programs import slug

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def modes_of(s: Settings) -> list[str]:
    return list(MODES) if s.eval_mode == "both" else [s.eval_mode]


def final_evaluation(model, processor, data, s: Settings, started: float) -> dict[str, Any]:
    """Evaluates in every mode of ``s``: tables on the screen and the files of ``write_reports`` in
    the run folder. ``started``: time.time() at the start of the program. Returns on the main rank
    what metrics.json holds, elsewhere nothing."""
    model.to(distributed.device())
    # --eval_limit shortens the evaluations during training, but not the one at its end.
    limit = (s.eval_limit or None) if s.eval_only else None
    reports = [
        evaluate(
            model,
            processor,
            data,
            mode,
            batch_size=s.val_batch_size,
            max_new_tokens=s.max_new_tokens,
            limit=limit,
            examples=s.examples,
            gallery=s.gallery,
            seed=s.seed,
            save_masks=s.save_masks,
        )
        for mode in modes_of(s)
    ]
    metrics: dict[str, Any] = {}
    if distributed.is_main():
        config = s.saved() | {"eval_only": s.eval_only}
        name = str(s.resume or s.version) if s.eval_only else s.exp_name
        seconds, proposals = time.time() - started, processor.proposals
        metrics = write_reports(
            reports, data, s.run_dir, config, seconds, name, proposals=proposals, limit=limit
        )
    distributed.barrier()
    return metrics


def settings_for(args: Namespace, flags: Sequence[str]) -> Settings:
    """Settings for what ``read_evaluation`` has read. A run brings its own data set as the default,
    a merged model its own precision. Raises UsageError."""
    model = Path(args.model)
    s = parse(["--eval_only", *_source(model, flags), *flags])
    out = args.out or model / "eval" / slug(s.val_dataset)
    s.log_base_dir, s.exp_name = str(out.parent), out.name
    return s


def _source(model: Path, flags: Sequence[str]) -> list[str]:
    """The flags of train_ds.py that load ``model``, which may be a run or a merged model."""
    if not build.is_finished(model):
        read_resumed(model)  # Raises UsageError if it is no run.
        return ["--resume", str(model)]
    source = ["--version", str(model)]
    if "--precision" in flags:
        return source
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    stored = PRECISIONS.get(str(config.get("dtype") or config.get("torch_dtype")), "fp32")
    if stored == "fp16" and not torch.cuda.is_available():
        stored = "fp32"  # torch cannot compute in fp16 on a CPU.
    return [*source, "--precision", stored]


def measure(args: Namespace, flags: Sequence[str], started: float) -> None:
    """The command of a model or a run; the rest is as in ``settings_for`` and
    ``final_evaluation``."""
    s = settings_for(args, flags)
    build.refuse_half_on_cpu(s)
    torch.manual_seed(s.seed)
    model, processor = build.build_model(s)
    final_evaluation(model, processor, build.build_eval(s, processor), s, started)


def score(args: Namespace, started: float) -> None:
    """The command of another system's masks; ``args``: of ``read_score``."""
    predictions = Predictions.read(args.predictions)
    # The levels only word the canonical answers, which play no part in scoring.
    data = EvalDataset(
        args.dataset_dir,
        args.val_dataset,
        ("SEG",),
        exemplar_count=0,
        texts=args.eval_texts,
        follow_links=args.follow_links,
    )
    prepare_output("--out", args.out, is_folder=True)
    report = score_predictions(
        predictions, data, args.eval_mode, args.examples, args.gallery, args.seed
    )
    config = {k: str(v) if isinstance(v, Path) else v for k, v in sorted(vars(args).items())}
    facts = {"missing_predictions": predictions.missing, "unused_predictions": predictions.unused}
    write_reports([report], data, args.out, config, time.time() - started, args.name, facts)
    for what, names in (
        ("without a prediction, scored as no mask", predictions.missing),
        ("predictions that belong to no target, left out", predictions.unused),
    ):
        if names:
            more = f" and {len(names) - 10} more, see metrics.json" if len(names) > 10 else ""
            print(command.shown(f"{len(names)} {what}: {', '.join(names[:10])}{more}"))

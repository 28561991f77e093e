"""Measuring from the command line, without training.

    # a model or a run; all other flags are those of train_ds.py
    python -m utils.evaluation MODEL_OR_RUN --val_dataset "ReasonSeg|val" --dataset_dir ./data

    # what changed between two evaluations, and could it be chance?
    python -m utils.evaluation compare A.json B.json --html compare.html

    # masks of another system
    python -m utils.evaluation score --predictions FOLDER_OR_JSON --val_dataset … --dataset_dir …

The first and the last write the same files; docs/evaluation.md describes them.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cores.dataset import command
from cores.dataset.files.write import prepare_output, refuse_foreign, write_text
from cores.dataset.mixture import EvalDataset
from cores.dataset.numbers import in_range
from cores.utils import distributed
from cores.utils.evaluation.predictions import Predictions, score_predictions
from cores.utils.evaluation.runner import MODES, evaluate
from cores.utils.evaluation.writer import write_reports
from cores.utils.report.compare import compare_targets, read_targets
from cores.utils.report.page import comparison_page
from cores.utils.settings.arguments import OneLineParser, Settings, parse, read_resumed
from cores.utils.settings.flags import UsageError

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


def run_settings(argv: Sequence[str]) -> Settings:
    """Settings for MODEL_OR_RUN and flags of train_ds.py. A run brings its own data set as the
    default, a merged model its own precision. Raises UsageError."""
    parser = OneLineParser(
        prog="python -m utils.evaluation",
        description=(
            "Measure a model or a run. All other flags are those of train_ds.py: --val_dataset,"
            " --dataset_dir, --eval_mode free|teacher_forced|both, --eval_texts first|all,"
            " --val_batch_size, --max_new_tokens, --seed …"
        ),
        epilog=(
            "Further commands: `compare A.json B.json` and `score --predictions …`, each with its"
            " own --help."
        ),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", help="model folder that the merge script wrote, or run folder of train_ds.py")
    add("--out", type=Path, help="folder for the results (default: MODEL_OR_RUN/eval/DATASET)")
    args, flags = parser.parse_known_args(list(argv))
    model = Path(args.model)
    if not model.is_dir():
        raise UsageError(
            f"{model}: no such folder; give a run of train_ds.py or a model that the merge script"
            " wrote"
        )
    s = parse(["--eval_only", *_source(model, flags), *flags])
    out = args.out or model / "eval" / slug(s.val_dataset)
    s.log_base_dir, s.exp_name = str(out.parent), out.name
    return s


def _source(model: Path, flags: Sequence[str]) -> list[str]:
    """The flags of train_ds.py that load ``model``, which may be a run or a merged model."""
    from cores.utils.build import is_finished

    if not is_finished(model):
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


def slug(dataset: str) -> str:
    """The name of an evaluation set as a file name: "ReasonSeg|val" -> "ReasonSeg-val"."""
    return "".join(c if c.isalnum() or c in "._" else "-" for c in dataset)


def run_command(argv: Sequence[str], started: float) -> None:
    from cores.utils import (
        build,  # imports deepspeed, which takes seconds that the other commands save
    )

    s = run_settings(argv)
    build.refuse_half_on_cpu(s)
    torch.manual_seed(s.seed)
    model, processor = build.build_model(s)
    final_evaluation(model, processor, build.build_eval(s, processor), s, started)


def read_score_arguments(argv: Sequence[str]) -> Namespace:
    parser = OneLineParser(prog="python -m utils.evaluation score", allow_abbrev=False)
    add = parser.add_argument
    masks = "folder of PNGs named by sample, or a JSON list of RLEs"
    add("--predictions", type=Path, required=True, help=masks)
    add("--val_dataset", required=True, help="evaluation set, name|split")
    add("--dataset_dir", required=True, help="root of all data sets")
    add("--name", help="of the system in tables (default: name of the folder or file)")
    add("--out", type=Path, help="folder for the results (default: runs/NAME/eval/DATASET)")
    how = "how the system answered (default: free)"
    add("--eval_mode", choices=MODES, default="free", help=how)
    wordings = "wordings of a query that are scored"
    add("--eval_texts", choices=["first", "all"], default="first", help=wordings)
    add(
        "--examples", type=in_range(int), default=16, help="rows of the contact sheet (default: 16)"
    )
    add(
        "--gallery",
        type=in_range(int),
        default=8,
        help="answers of each kind in report.html (default: 8)",
    )
    add(
        "--seed",
        type=in_range(int, 0, 2**63 - 1),
        default=0,
        help="of the bootstrap and of the choice of pictures",
    )
    links = "files may be links out of the data folder"
    add("--follow_links", action="store_true", help=links)
    args = parser.parse_args(list(argv))
    for flag in ("examples", "gallery", "seed"):
        if getattr(args, flag) < 0:
            raise UsageError(f"--{flag} is {getattr(args, flag)}; it must not be negative")
    args.name = args.name or args.predictions.resolve().stem
    args.out = args.out or Path("runs") / slug(args.name) / "eval" / slug(args.val_dataset)
    if args.predictions.is_file() and args.predictions.resolve().parent == args.out.resolve():
        raise UsageError(
            f"--out {args.out}: is the folder of --predictions, where results would replace files;"
            " give another folder"
        )
    return args


def score_command(argv: Sequence[str], started: float) -> None:
    args = read_score_arguments(argv)
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


def compare_command(argv: Sequence[str]) -> None:
    parser = OneLineParser(prog="python -m utils.evaluation compare", allow_abbrev=False)
    add = parser.add_argument
    add("a", type=Path, help="targets-<mode>.json of the first system, or the folder that holds it")
    add("b", type=Path, help="the same of the second system, on the same data")
    add("--html", type=Path, help="also write the comparison as a page")
    changes = "samples that changed most, in each direction (default: 10)"
    add("--top", type=in_range(int), default=10, help=changes)
    add("--seed", type=in_range(int, 0, 2**63 - 1), default=0, help="of the bootstrap")
    args = parser.parse_args(list(argv))
    if args.html:
        refuse_foreign(args.html, b"<!doctype html", "--html")
    prepare_output("--html", args.html)
    found = compare_targets(read_targets(args.a), read_targets(args.b), args.top, args.seed)
    print(found.table())
    if args.html:
        write_text(args.html, comparison_page(found))
        print(f"written to {args.html}")


@command.entry(memory="lower --val_batch_size, or use --load_in_4bit")
def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for a mistake in flags or files."""
    started, argv = time.time(), sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        compare_command(argv[1:])
    elif argv[:1] == ["score"]:
        score_command(argv[1:], started)
    else:
        with distributed.joined():
            run_command(argv, started)
    return 0

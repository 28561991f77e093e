"""Measuring from the command line, without training.

    python -m utils.evaluation MODEL_OR_RUN --val_dataset "ReasonSeg|val" --dataset_dir ./data      # flags of train_ds.py
    python -m utils.evaluation compare A.json B.json --html compare.html                          # what changed, and is it real?
    python -m utils.evaluation score --predictions FOLDER_OR_JSON --val_dataset … --dataset_dir …   # masks of another system

The first and the last write the same files; docs/evaluation.md describes them.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from dataset.files.errors import DataError
from dataset.files.write import write_text
from dataset.mixture import EvalDataset
from utils import distributed
from utils.evaluation.predictions import Predictions, score_predictions
from utils.evaluation.run import MODES, evaluate, write_reports
from utils.report.compare import compare, read_targets
from utils.report.page import comparison_page
from utils.report.results import Report
from utils.settings.arguments import OneLineParser, Settings, one_line, parse, read_resumed
from utils.settings.flags import UsageError

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


# ----------------------------------------------------------------------------- shared with train_ds


def modes_of(s: Settings) -> list[str]:
    return list(MODES) if s.eval_mode == "both" else [s.eval_mode]


def _limit(s: Settings) -> int | None:
    """Images of the last evaluation of a program: all of them after training."""
    return (s.eval_limit or None) if s.eval_only else None


def evaluate_settings(model, processor, data, s: Settings) -> list[Report]:
    model.to(distributed.device())
    return [
        evaluate(
            model,
            processor,
            data,
            mode,
            batch_size=s.val_batch_size,
            max_new_tokens=s.max_new_tokens,
            limit=_limit(s),
            examples=s.examples,
            gallery=s.gallery,
            seed=s.seed,
            progress=distributed.is_main(),
        )
        for mode in modes_of(s)
    ]


def finish(model, processor, data, s: Settings, started: float) -> None:
    """The final evaluation: tables on the screen and the files of ``write_reports`` in the run
    folder."""
    reports = evaluate_settings(model, processor, data, s)
    if distributed.is_main():
        config = s.saved() | {"eval_only": s.eval_only}
        name = str(s.resume or s.version) if s.eval_only else s.exp_name
        write_reports(
            reports,
            data,
            s.run_dir,
            config,
            time.time() - started,
            name=name,
            proposals=processor.proposals,
            limit=_limit(s),
        )
    distributed.barrier()


# -------------------------------------------------------------------------------------- run a model


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
    parser.add_argument(
        "model", help="model folder that the merge script wrote, or run folder of train_ds.py"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the results (default: MODEL_OR_RUN/eval/DATASET)"
    )
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
    from utils.build import is_merged

    if not is_merged(str(model)):
        read_resumed(model)  # a UsageError if it is no run
        return ["--resume", str(model)]
    source = ["--version", str(model)]
    if "--precision" in flags:
        return source
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    stored = PRECISIONS.get(str(config.get("dtype") or config.get("torch_dtype")), "fp32")
    return [
        *source,
        "--precision",
        "fp32" if stored == "fp16" and not torch.cuda.is_available() else stored,
    ]


def slug(dataset: str) -> str:
    """The name of an evaluation set as a file name: "ReasonSeg|val" -> "ReasonSeg-val"."""
    return "".join(c if c.isalnum() or c in "._" else "-" for c in dataset)


def run_command(argv: Sequence[str], started: float) -> None:
    from utils import build  # deepspeed comes with it, and takes its time

    s = run_settings(argv)
    build.refuse_half_on_cpu(s)
    distributed.start()
    torch.manual_seed(s.seed)
    model, processor = build.load_for_evaluation(s)
    finish(model, processor, build.build_eval(s, processor), s, started)


# ----------------------------------------------------------------------------------- score, compare


def read_score_arguments(argv: Sequence[str]) -> Namespace:
    parser = OneLineParser(prog="python -m utils.evaluation score", allow_abbrev=False)
    parser.add_argument(
        "--predictions",
        type=Path,
        required=True,
        help="folder of PNGs named by sample, or a JSON list of RLEs",
    )
    parser.add_argument("--val_dataset", required=True, help="evaluation set, name|split")
    parser.add_argument("--dataset_dir", required=True, help="root of all data sets")
    parser.add_argument(
        "--name", help="of the system in tables (default: name of the folder or file)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the results (default: runs/NAME/eval/DATASET)"
    )
    parser.add_argument(
        "--eval_mode", choices=MODES, default="free", help="how the system answered (default: free)"
    )
    parser.add_argument(
        "--eval_texts",
        choices=["first", "all"],
        default="first",
        help="wordings of a query that are scored",
    )
    parser.add_argument(
        "--examples", type=int, default=16, help="rows of the contact sheet (default: 16)"
    )
    parser.add_argument(
        "--gallery", type=int, default=8, help="answers of each kind in report.html (default: 8)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the bootstrap and of the choice of pictures"
    )
    args = parser.parse_args(list(argv))
    for flag in ("examples", "gallery", "seed"):
        if getattr(args, flag) < 0:
            raise UsageError(f"--{flag} is {getattr(args, flag)}; it must not be negative")
    args.name = args.name or args.predictions.resolve().stem
    args.out = args.out or Path("runs") / slug(args.name) / "eval" / slug(args.val_dataset)
    return args


def score_command(argv: Sequence[str], started: float) -> None:
    args = read_score_arguments(argv)
    predictions = Predictions.read(args.predictions)
    # the answers' wording plays no part here; any level will do
    data = EvalDataset(
        args.dataset_dir, args.val_dataset, ("SEG",), exemplar_count=0, texts=args.eval_texts
    )
    try:
        args.out.mkdir(parents=True, exist_ok=True)  # not after the work
    except OSError as error:
        raise UsageError(
            f"--out {args.out}: results cannot be written there ({error.strerror}); give another"
            " folder"
        ) from None
    report = score_predictions(
        predictions, data, args.eval_mode, args.examples, args.gallery, args.seed
    )
    config = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in sorted(vars(args).items())
    }
    facts = {"missing_predictions": predictions.missing, "unused_predictions": predictions.unused}
    write_reports([report], data, args.out, config, time.time() - started, args.name, facts)
    _tell("without a prediction, scored as no mask", predictions.missing)
    _tell("predictions that belong to no target, left out", predictions.unused)


def _tell(what: str, names: Sequence[str], shown: int = 10) -> None:
    if names:
        more = f" and {len(names) - shown} more, see metrics.json" if len(names) > shown else ""
        print(f"{len(names)} {what}: {', '.join(names[:shown])}{more}")


def compare_command(argv: Sequence[str]) -> None:
    parser = OneLineParser(prog="python -m utils.evaluation compare", allow_abbrev=False)
    parser.add_argument(
        "a", type=Path, help="targets-<mode>.json of the first system, or the folder that holds it"
    )
    parser.add_argument("b", type=Path, help="the same of the second system, on the same data")
    parser.add_argument("--html", type=Path, help="also write the comparison as a page")
    parser.add_argument(
        "--top",
        type=int,
        default=10,
        help="samples that changed most, in each direction (default: 10)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    args = parser.parse_args(list(argv))
    if args.top < 0 or args.seed < 0:
        raise UsageError("--top and --seed must not be negative")
    found = compare(read_targets(args.a), read_targets(args.b), args.top, args.seed)
    print(found.table())
    if args.html:
        write_text(args.html, comparison_page(found))
        print(f"written to {args.html}")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for a mistake in flags or files."""
    started, argv = time.time(), sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["compare"]:
            compare_command(argv[1:])
        elif argv[:1] == ["score"]:
            score_command(argv[1:], started)
        else:
            run_command(argv, started)
    except (UsageError, DataError, ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0

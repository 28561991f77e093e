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

import time
from argparse import Namespace

from cores.dataset import command
from cores.dataset.files.write import prepare_output, refuse_foreign, write_text
from cores.utils.settings.programs import read_compare, read_evaluation, read_score


def compare(args: Namespace) -> None:
    """The command of two results; ``args``: of ``read_compare``."""
    from cores.utils.report.compare import compare_targets, read_pair
    from cores.utils.report.page import comparison_page

    if args.html:
        refuse_foreign(args.html, b"<!doctype html", "--html")
    prepare_output("--html", args.html)
    found = compare_targets(*read_pair(args.a, args.b, args.eval_mode), args.top, args.seed)
    print(found.table())
    if args.html:
        from cores.utils.evaluation.pictures import draw_changes  # It takes torch to read data.

        write_text(args.html, comparison_page(found, *draw_changes(found)))
        print(f"written to {args.html}")


@command.entry(memory="lower --val_batch_size, or use --load_in_4bit")
def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for a mistake in flags or files."""
    started, argv = time.time(), list(command.arguments(argv))
    # What is not asked for is not imported: comparing two results needs no model.
    if argv[:1] == ["compare"]:
        compare(read_compare(argv[1:]))
    elif argv[:1] == ["score"]:
        args = read_score(argv[1:])
        from cores.utils.evaluation import measuring

        measuring.score(args, started)
    else:
        args, flags = read_evaluation(argv)
        from cores.utils import distributed
        from cores.utils.evaluation import measuring

        with distributed.joined():
            measuring.measure(args, flags, started)
    return 0

"""Folds the trained weights into one model folder, which ``from_pretrained``, ``chat.py`` and
``--eval_only`` load.

    python merge_lora_weights_and_save_hf_model.py --run runs/demo --save_path runs/demo/model
    python merge_lora_weights_and_save_hf_model.py --weight SOURCE --save_path OUT --version LLAVA --vision_pretrained SAM
    python merge_lora_weights_and_save_hf_model.py --merged runs/demo/model --layout lisa --save_path OUT

A run folder remembers its settings, so rank and α are never typed again; further flags of
train_ds.py may say where the backbones are now, and are checked where they say how the weights were
trained. SOURCE is what there is without a run folder: a DeepSpeed checkpoint folder of any ZeRO
stage and number of ranks, a consolidated file, a folder or an index of shards (what
``zero_to_fp32.py`` writes), or a PEFT adapter, which needs a finished model as --version.
``--layout lisa`` writes LISA's own layout instead of ours. The merge is done in float32, layer by
layer, and stored in --precision.
"""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from pathlib import Path

from utils import distributed

distributed.prepare_environment()  # before anything imports deepspeed

from model.cores import CoresForReasoningSegmentation  # noqa: E402
from model.export import save_published  # noqa: E402
from model.processor import CoresProcessor  # noqa: E402
from model.reasoning.lora import has_lora, merge_lora  # noqa: E402
from utils import build  # noqa: E402
from utils.settings.arguments import OneLineParser, one_line  # noqa: E402
from utils.settings.flags import DTYPES, UsageError  # noqa: E402
from utils.training import checkpoint  # noqa: E402


def read_arguments(argv: list[str] | None) -> tuple[Namespace, list[str]]:
    """This script's flags, and the rest, which are flags of train_ds.py."""
    parser = OneLineParser(
        description="Merge LoRA and save a model folder. Further flags: those of train_ds.py.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run", help="run folder that train_ds.py wrote, or one of its checkpoints"
    )
    parser.add_argument(
        "--weight",
        help="the same as --run, or a file, a folder, an index or an adapter with trained weights",
    )
    parser.add_argument(
        "--merged", help="a merged model, to write it in another --layout or --precision"
    )
    parser.add_argument(
        "--which", choices=["best", "last"], help="checkpoint of the run (default: best)"
    )
    parser.add_argument("--save_path", required=True, help="folder to write; must be new or empty")
    parser.add_argument(
        "--precision",
        choices=list(DTYPES),
        help="of the stored weights (default: that of the run, or bf16)",
    )
    parser.add_argument(
        "--layout",
        choices=["cores", "lisa"],
        default="cores",
        help="of the folder (default: cores)",
    )
    own, rest = parser.parse_known_args(argv)
    if sum(map(bool, (own.run, own.weight, own.merged))) != 1:
        raise UsageError("give one of --run RUN_FOLDER, --weight SOURCE and --merged MODEL_FOLDER")
    if own.which and own.merged:
        raise UsageError(
            "--which: --merged is one model, not the checkpoints of a run; leave the flag out"
        )
    return own, rest


def load(own: Namespace, rest: list[str]) -> tuple[CoresForReasoningSegmentation, CoresProcessor]:
    """The model with its adapters apart, weights in the precision to store, and its processor."""
    if own.merged:
        if rest:
            raise UsageError(f"{' '.join(rest)}: --merged takes no flags of the training")
        dtype = DTYPES[own.precision] if own.precision else "auto"
        return CoresForReasoningSegmentation.from_pretrained(
            own.merged, dtype=dtype
        ), CoresProcessor.from_pretrained(own.merged)
    source = Path(own.run or own.weight)
    if build.is_merged(str(source)):
        raise UsageError(
            f"{source}: is merged already; give the run folder that it came from, or --merged for"
            " another layout"
        )
    if own.run and not checkpoint.is_run(source):
        raise UsageError(
            f"{source}: neither a run folder nor a checkpoint in one (--run); weights without a run"
            " go with --weight"
        )
    if checkpoint.is_run(source):
        return build.build_merging(source, own.which or "best", own.precision, rest)
    return build.build_from_source(source, own.precision or "bf16", rest)


def save(
    model: CoresForReasoningSegmentation, processor: CoresProcessor, folder: Path, layout: str
) -> None:
    """The files appear only when they are complete; ``folder`` is new or empty, and may be "." or a
    link."""
    folder = folder.resolve()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if layout == "lisa":
        save_published(model, processor, partial)
    else:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    folder.mkdir(exist_ok=True)
    for file in sorted(partial.iterdir()):
        shutil.move(file, folder)
    partial.rmdir()


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for a mistake in flags or files."""
    try:
        own, rest = read_arguments(argv)
        folder = Path(own.save_path)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(
                f"{folder}: exists and is not empty; give another --save_path or delete it"
            )
        model, processor = load(own, rest)
        if has_lora(model):
            merge_lora(model)
        save(model, processor, folder, own.layout)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    print(f"{folder}: saved; try `python chat.py --version {folder}`")
    return 0


if __name__ == "__main__":
    sys.exit(main())

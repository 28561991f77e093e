"""Folds the trained weights into one model folder, which ``from_pretrained``, ``chat.py`` and ``--eval_only`` load.

    python merge_lora_weights_and_save_hf_model.py --run runs/demo --save_path runs/demo/model
    python merge_lora_weights_and_save_hf_model.py --weight FILE --save_path OUT --version LLAVA --vision_pretrained SAM

A run folder remembers its settings, so rank and α are never typed again. ``--weight FILE`` is for weights without a run
folder (what ``zero_to_fp32.py`` writes, or safetensors); then the flags of train_ds.py must describe the model they
belong to (--lora_r, …). The merge is done in float32 and stored in --precision.
"""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from pathlib import Path

from utils import distributed

distributed.prepare_environment()  # before anything imports deepspeed

from model.lora import has_lora, merge_lora  # noqa: E402
from utils import build, checkpoint  # noqa: E402
from utils.arguments import OneLineParser, UsageError, parse, read_resumed  # noqa: E402
from utils.engine import DTYPES  # noqa: E402


def read_arguments(argv: list[str] | None) -> tuple[Namespace, list[str]]:
    """This script's flags, and the rest, which are flags of train_ds.py."""
    parser = OneLineParser(
        description="Merge LoRA and save a model folder. Further flags: those of train_ds.py.", allow_abbrev=False
    )
    parser.add_argument("--run", help="run folder that train_ds.py wrote, or one of its checkpoints")
    parser.add_argument("--weight", help="the same as --run, or a file with trained weights")
    parser.add_argument("--which", choices=["best", "last"], default="best", help="checkpoint of the run (default: best)")
    parser.add_argument("--save_path", required=True, help="folder to write; must be new or empty")
    parser.add_argument("--precision", choices=list(DTYPES), help="of the stored weights (default: that of the run, or bf16)")
    own, rest = parser.parse_known_args(argv)
    if bool(own.run) == bool(own.weight):
        raise UsageError("give either --run RUN_FOLDER or --weight FILE")
    return own, rest


def load(own: Namespace, rest: list[str]):
    """(model in float32 with its adapters apart, processor, precision of training)."""
    source = Path(own.run or own.weight)
    if build.is_merged(str(source)):
        raise UsageError(f"{source}: is merged already; give the run folder that it came from")
    if source.is_dir():
        if rest:
            raise UsageError(f"{' '.join(rest)}: the run folder {source} knows its own settings; leave this out")
        model, processor, _ = build.build_trained(source, own.which, precision="fp32")
        return model, processor, read_resumed(source)["precision"]
    weights = checkpoint.read_weights(source)
    settings = parse([*rest, "--precision", "fp32"])
    model, processor = build.build_model(settings)
    build.make_trainable(model, settings)
    checkpoint.put_weights(model, weights, source)
    return model, processor, "bf16"


def save(model, processor, folder: Path) -> None:
    """The folder appears only when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for a mistake in flags or files."""
    try:
        own, rest = read_arguments(argv)
        folder = Path(own.save_path)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder}: exists and is not empty; give another --save_path or delete it")
        model, processor, precision = load(own, rest)
        if has_lora(model):
            merge_lora(model)
        save(model.to(DTYPES[own.precision or precision]), processor, folder)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{folder}: saved; try `python chat.py --version {folder}`")
    return 0


if __name__ == "__main__":
    sys.exit(main())

r"""Folds the trained weights into one model folder, which ``from_pretrained``, ``chat.py`` and
``--eval_only`` load.

    python merge_lora_weights_and_save_hf_model.py --run runs/demo --save_path runs/demo/model
    python merge_lora_weights_and_save_hf_model.py --weight SOURCE --save_path OUT \
        --version LLAVA --vision_pretrained SAM
    python merge_lora_weights_and_save_hf_model.py --merged runs/demo/model --layout lisa \
        --save_path OUT

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
from typing import Any, NamedTuple

from cores.dataset import command
from cores.utils.settings.programs import read_merge

if __name__ == "__main__":
    command.guard(read_merge)

from cores.utils import distributed

distributed.prepare_environment()  # It must come before any import of deepspeed.

from cores.dataset.files.write import all_or_nothing, remove, sync  # noqa: E402
from cores.model.card import CARD, WHOLE, model_card  # noqa: E402
from cores.model.checkpoints.precision import DTYPES  # noqa: E402
from cores.model.checkpoints.source import open_source  # noqa: E402
from cores.model.checkpoints.weights import read_json_file  # noqa: E402
from cores.model.cores import CoresForReasoningSegmentation  # noqa: E402
from cores.model.export import save_published  # noqa: E402
from cores.model.processor import CoresProcessor  # noqa: E402
from cores.model.pushed import card_for  # noqa: E402
from cores.model.reasoning.lora import adapted_layers, has_lora, merge_lora  # noqa: E402
from cores.utils import build  # noqa: E402
from cores.utils.settings.arguments import (  # noqa: E402
    FREE_ON_RESUME,
    Settings,
    parse_over,
    read_resumed,
)
from cores.utils.settings.flags import UsageError  # noqa: E402
from cores.utils.settings.saved import run_of  # noqa: E402
from cores.utils.training import checkpoint  # noqa: E402
from cores.utils.training.verify import read_progress  # noqa: E402

# What merging may find elsewhere than training did, or does not depend on.
FREE_IN_MERGE = FREE_ON_RESUME | {
    "version",
    "vision_pretrained",
    "vision_tower",
    "features_pretrained",
    "precision",
    "log_base_dir",
    "exp_name",
}


class Loaded(NamedTuple):
    """What is written into the folder."""

    model: CoresForReasoningSegmentation
    """With its adapters apart, weights in the precision to store."""
    processor: CoresProcessor
    card: str
    """The model card."""


def load(args: Namespace, rest: list[str]) -> Loaded:
    if args.merged:
        source = open_source(args.merged)
        dtype = DTYPES[args.precision] if args.precision else "auto"
        model = CoresForReasoningSegmentation.from_pretrained(source, dtype=dtype)
        card = card_for(model.config, source)
        return Loaded(model, CoresProcessor.from_pretrained(source), card)
    origin = Path(args.run or args.weight)
    if build.is_finished(origin):
        raise UsageError(
            f"{origin}: is merged already; give the run folder that it came from, or --merged for"
            " another layout"
        )
    if args.run and not run_of(origin):
        raise UsageError(
            f"{origin}: neither a run folder nor a checkpoint in one (--run); weights without a run"
            " go with --weight"
        )
    run = run_of(origin)
    if run:
        settings = settings_of_run(origin, rest)
        known = read_resumed(origin)
        settings.precision = args.precision or settings.precision
        origin = checkpoint.find_weights(origin, args.which or "best")
        weights = checkpoint.read_weights(origin)
        known["images_per_step"] = (read_progress(origin) or {}).get("images_per_step")
    else:
        known = {}
        weights = checkpoint.read_weights(origin)
        settings = settings_without_run(origin, rest, weights)
        settings.precision = args.precision or "bf16"
    backbones = backbones_of(settings)
    metrics, unmeasured = measured(run, origin, known)
    model, processor = build.unmerged_model(settings, weights, origin, to_merge=True)
    card = model_card(model.config, backbones, known, metrics, unmeasured)
    return Loaded(model, processor, card)


def backbones_of(settings: Settings) -> dict[str, str]:
    """Part -> where its weights came from, as flags and the config of --version name it."""
    source = build.open_version(settings)
    if source.finished:
        return {WHOLE: settings.version}
    tower = source.config.get("mm_vision_tower")
    return {
        "language model and projector": settings.version,
        "CLIP": settings.vision_tower or (tower if isinstance(tower, str) else ""),
        "SAM": settings.vision_pretrained,
        "DINOv2": settings.features_pretrained,
    }


def measured(run: Path | None, weights: Path, known: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What the metrics.json of a run says about these ``weights`` of it, or {} and why nothing.

    A run measures its best checkpoint at its end, one of ZeRO-3 its last. ``known``: the settings
    of the run."""
    if run is None:
        return {}, "the weights came without the run that trained them"
    which = "last" if known.get("zero_stage") == 3 else "best"
    if weights.name.removesuffix(".old") != which:
        return {}, f"the run has measured its {which} checkpoint, and these weights are others"
    try:
        metrics = read_json_file(run, "metrics.json")
    except (OSError, ValueError):
        return {}, "the run has no metrics.json that can be read"
    config = metrics.get("config")
    if not isinstance(config, dict) or any(
        config[name] != known[name] for name in config.keys() & known.keys() - FREE_ON_RESUME
    ):
        return {}, "the run's metrics.json is that of another training"
    return metrics, ""


def settings_of_run(run: Path, rest: list[str]) -> Settings:
    """The settings of a run folder with the flags ``rest`` on top. They may say where things are
    now; a UsageError refuses those that would make other weights of them."""
    saved = read_resumed(run)
    settings = parse_over(saved, rest)
    for name in sorted(saved.keys() - FREE_IN_MERGE):
        if getattr(settings, name, saved[name]) != saved[name]:
            now = getattr(settings, name)
            raise UsageError(
                f"--{name} {now}: the run {run} was trained with {saved[name]}; leave the flag out"
            )
    if settings.version != saved["version"]:
        refuse_other_kind(settings.version, saved, run)
    return settings


def refuse_other_kind(version: str, saved: dict[str, Any], run: Path) -> None:
    """Raises UsageError where --version is a merged model and the run was trained on a backbone, or
    the other way round."""
    finished = build.is_finished(version)
    if not finished and not saved["vision_pretrained"]:
        raise UsageError(
            f"--version {version}: is a backbone; the run {run} went on from the model"
            f" {saved['version']}"
        )
    went_on = Path(saved["version"]).exists() and build.is_finished(saved["version"])
    if finished and saved["vision_pretrained"] and not went_on:
        raise UsageError(
            f"--version {version}: is merged already; the run {run} was trained on the backbone"
            f" {saved['version']}"
        )


def settings_without_run(origin: Path, rest: list[str], weights: dict[str, Any]) -> Settings:
    """For trained ``weights`` without a run folder: the flags ``rest`` must describe the model that
    they belong to, except for what a PEFT adapter says itself."""
    settings = parse_over({}, rest)
    given = {flag.split("=")[0] for flag in rest}
    if not checkpoint.is_adapter(origin):
        if settings.lora_r and "--lora_alpha" not in given:
            scale = "α/√r" if settings.use_rslora else "α/r (--use_rslora: α/√r)"
            print(
                f"{origin}: does not say with which α it was trained; --lora_alpha"
                f" {settings.lora_alpha} is taken, with the scale {scale}"
            )
        return settings
    source = build.open_version(settings)
    if not source.finished:
        raise UsageError(
            f"{origin}: an adapter holds no mask branch, so --version must be a finished model, not"
            " a backbone"
        )
    adapter = read_json_file(origin, checkpoint.ADAPTER_CONFIG)
    checkpoint.refuse_other_adapters(adapter, origin)
    for name in ("lora_r", "lora_alpha", "use_dora", "use_rslora"):
        said = adapter.get("r" if name == "lora_r" else name, False)
        if {f"--{name}", f"--no-{name}"} & given and getattr(settings, name) != said:
            raise UsageError(
                f"--{name} {getattr(settings, name)}: {origin} says {said}; leave the flag out"
            )
        setattr(settings, name, said)
    targets = adapter["target_modules"]
    if isinstance(targets, str):  # A pattern speaks of names in the model that PEFT was given.
        targets = adapted_layers(weights)
    settings.lora_target_modules = ",".join(targets)
    settings.levels = ",".join(build.prompt_format(settings, source).levels)
    return settings


def save(loaded: Loaded, folder: Path, layout: str) -> None:
    """``folder``, which is new or empty and may be "." or a link, appears when it is complete; a
    merge that was killed leaves a hidden folder beside it, which the next one removes. Raises
    OSError naming ``folder``."""
    model, processor, card = loaded
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.merging")
    shutil.rmtree(partial, ignore_errors=True)
    with all_or_nothing(folder, partial):
        if layout == "lisa":
            save_published(model, processor, partial)
        else:
            model.save_pretrained(partial)
            processor.save_pretrained(partial)
        (partial / CARD).write_text(card, encoding="utf-8")
        for file in sorted(partial.rglob("*"), reverse=True):
            sync(file)
        if folder == Path.cwd() or folder.is_mount():  # It must stay the folder that it is.
            _move_into(folder, partial)
        else:
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)


def _move_into(folder: Path, partial: Path) -> None:
    """What is in ``partial`` to the empty ``folder``, all or nothing."""
    files = sorted(partial.iterdir(), key=lambda file: file.name == "config.json")
    moved = [folder / file.name for file in files]
    try:
        for file, target in zip(files, moved, strict=True):
            shutil.move(file, target)
    except BaseException:
        for target in moved:
            remove(target)
        raise
    partial.rmdir()


@command.entry()
def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for a mistake in flags or files."""
    args, rest = read_merge(argv)
    folder = Path(args.save_path)
    loaded = load(args, rest)
    if has_lora(loaded.model):
        merge_lora(loaded.model)
    save(loaded, folder, args.layout)
    chat = "cores chat" if command.started_as("").startswith("cores ") else "python chat.py"
    print(f"{folder}: saved; try `{chat} --version {folder}`")
    return 0


if __name__ == "__main__":
    sys.exit(main())

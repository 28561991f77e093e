"""From settings to parts: model and processor, training mixture, evaluation set."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from segment_anything.modeling import Sam

from dataset.mixture import EvalDataset, TrainMixture
from dataset.proposals import ProposalSource
from model.checkpoints import published
from model.checkpoints.precision import choose_attention, quantization
from model.checkpoints.sam import load_sam
from model.checkpoints.weights import find_file, looks_like_path, read_json_file
from model.cores import CoresForReasoningSegmentation
from model.processor import FILE as PROCESSOR_FILE
from model.processor import CoresProcessor
from model.reasoning.chain import enable_checkpointing
from model.reasoning.lora import add_lora, load_adapter
from model.reasoning.prefix_sharing import PrefixSharing
from model.segmenting.embedding_cache import SamCache, encoder_fingerprint
from model.trainable import set_trainable
from utils import distributed
from utils.settings.arguments import (
    FREE_ON_RESUME,
    Settings,
    numbers,
    parse_over,
    read_resumed,
    settings_of,
)
from utils.settings.flags import DTYPES, SELECTING, UsageError
from utils.training import checkpoint
from utils.training.loader import samples_per_epoch

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
# name: hidden size, patch size, image size
VISION_TOWERS = {
    "openai/clip-vit-large-patch14": (1024, 14, 224),
    "openai/clip-vit-large-patch14-336": (1024, 14, 336),
}


def is_merged(version: str) -> bool:
    """Whether ``version`` is a finished model, ours or a published LISA or CoReS, rather than a
    backbone."""
    if (Path(version) / PROCESSOR_FILE).is_file():
        return True
    return published.is_whole(version) or (
        not looks_like_path(version) and find_file(version, PROCESSOR_FILE) is not None
    )


class PromptFormat(NamedTuple):
    """What data sets need to know of a model, without loading it."""

    levels: list[str]
    exemplar_count: int


def prompt_format(s: Settings) -> PromptFormat:
    """Raises UsageError if a model's files are not there, before anything large is read."""
    if is_merged(s.version):
        processor = finished_processor(s)
        return PromptFormat(processor.levels, processor.exemplar_count)
    if not s.vision_pretrained:
        raise UsageError(
            f"{s.version}: is no merged model, so --vision_pretrained must name a SAM checkpoint"
        )
    if not Path(s.vision_pretrained).exists():
        raise UsageError(f"{s.vision_pretrained}: no such SAM checkpoint (--vision_pretrained)")
    return PromptFormat(s.level_list, s.exemplar_count)


def build_model(s: Settings) -> tuple[CoresForReasoningSegmentation, CoresProcessor]:
    """A new model from backbones, or a merged one to go on from; weights in --precision, nothing
    trainable yet."""
    loading: dict[str, Any] = {"vision_tower": s.vision_tower or None}
    if s.bits:
        loading["quantization_config"] = quantization(s.bits, DTYPES[s.precision])
    if is_merged(s.version):
        processor = finished_processor(s)
        if processor.levels != s.level_list:
            raise UsageError(
                f"{s.version}: was trained with the levels {','.join(processor.levels)}, --levels"
                f" says {s.levels}"
            )
        model = CoresForReasoningSegmentation.from_pretrained(
            s.version, dtype=DTYPES[s.precision], **loading
        )
        processor.tokenizer.model_max_length = s.model_max_length
        model.config.set_losses(**loss_config(s))
        refuse_other_method(s, model)
    else:
        prompt_format(s)
        model, processor = CoresForReasoningSegmentation.from_backbones(
            s.version,
            s.vision_pretrained,
            s.level_list,
            template=s.conv_type,
            exemplar_count=s.exemplar_count,
            dtype=DTYPES[s.precision],
            model_max_length=s.model_max_length,
            refiner=(
                {"kind": "none"}
                if s.refiner == "none"
                else {"prototypes": s.refiner, "pooling": s.pooling}
            ),
            text_projection_norm=s.text_projection_norm,
            system=s.system_prompt or None,
            features_pretrained=s.features_pretrained or None,
            selector=selector_config(s),
            **loading,
            **loss_config(s),
        )
    check_facts(s, model, processor)
    set_speed(model, processor, s)
    # data loading processes have no network: with workers, training reads the store only
    processor.proposals = model.proposal_source(s.proposals or None, generate=s.workers == 0)
    return model, processor


def refuse_other_method(s: Settings, model: CoresForReasoningSegmentation) -> None:
    """Raises UsageError if training would go on from a model of a method that another mask branch
    belongs to."""
    chain = model.selecting is not None and model.config.decodes
    found = (
        "a CoReS or LISA"
        if model.selecting is None
        else "a CoReS with a selector"
        if chain
        else "an LLM-Seg"
    )
    if (model.selecting is not None, chain) != (
        s.method in SELECTING,
        s.method == "cores+select",
    ) and not s.eval_only:
        raise UsageError(f"{s.version}: is {found}, --method says {s.method}")


def set_speed(model: CoresForReasoningSegmentation, processor: CoresProcessor, s: Settings) -> None:
    """Applies SpeedArguments."""
    attention, reason = choose_attention(
        s.attn_implementation, DTYPES[s.precision], distributed.device()
    )
    if s.attn_implementation == "auto" and distributed.is_main():
        print(f"attention: {attention} ({reason})")
    model.reasoning.llava.set_attn_implementation({"": "sdpa", "text_config": attention})
    model.reasoning.sharing = PrefixSharing(s.prefix_sharing, s.pack_tokens)
    if s.compile:
        refuse_no_compiler(s)
        model.segmenting.sam.image_encoder.compile()
    if s.sam_cache:
        if model.selecting is not None and model.selecting.encoder is not None:
            raise UsageError(
                "--sam_cache: this selector looks at DINOv2's features, which it does not keep;"
                " leave the flag out"
            )
        name = encoder_fingerprint(model.segmenting.sam.image_encoder, processor.image_size)
        processor.sam_cache = SamCache(s.sam_cache, name, s.sam_cache_dtype, s.sam_cache_gb)
        model.segmenting.store_embedding = processor.sam_cache.store


def refuse_no_compiler(s: Settings) -> None:
    """Raises UsageError where --compile could not work."""
    if s.zero_stage == 3 and not s.eval_only:
        raise UsageError(
            "--compile: ZeRO stage 3 takes the weights apart, which torch.compile cannot follow;"
            " use --zero_stage 2"
        )
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    if distributed.device().type == "cpu" and not any(
        name and shutil.which(name) for name in compilers
    ):
        raise UsageError(
            "--compile: no C++ compiler found ($CXX, g++, clang++), which torch.compile needs on"
            " a CPU"
        )


def build_sam_only(s: Settings) -> tuple[Sam, int]:
    """The SAM that these settings train with, in --precision, and its image size."""
    if is_merged(s.version):
        model, processor = build_model(s)
        return model.segmenting.sam, processor.image_size
    prompt_format(s)
    sam, dims = load_sam(s.vision_pretrained)
    return sam.to(DTYPES[s.precision]), dims.image_size


def finished_processor(s: Settings) -> CoresProcessor:
    """Of a finished model; --conv_type and --system_prompt speak for a published one, whose files
    say neither."""
    processor = CoresProcessor.from_pretrained(
        s.version, template=s.conv_type, vision_tower=s.vision_tower or None
    )
    processor.system = s.system_prompt or processor.system
    return processor


def selector_config(s: Settings) -> dict | None:
    """Fields of SelectorConfig, or None for a method without a selector."""
    if s.method not in SELECTING:
        return None
    chain = s.method == "cores+select"
    return {
        "features": s.features,
        "chain": chain,
        "rule": s.select or ("similarity" if chain else "iop"),
        "ranking": s.proposal_ranking,
        "count": s.proposal_count,
        "pool_size": s.pool_size,
        "place": s.proposal_place,
        "proposals": {
            "points_per_side": s.proposal_points,
            "predicted_iou": s.proposal_iou,
            "stability": s.proposal_stability,
            "multimask": s.proposal_multimask,
        },
    }


def select_as(model: CoresForReasoningSegmentation, s: Settings) -> ProposalSource | None:
    """For evaluation: the rule of --select, if it is set; proposals from --proposals, and what is
    missing there is computed."""
    if model.selecting is not None and s.select:
        model.selecting.config = dataclasses.replace(model.selecting.config, rule=s.select)
    return model.proposal_source(s.proposals or None)


def loss_config(s: Settings) -> dict:
    levels = numbers(s.level_loss_weights, "--level_loss_weights") if s.level_loss_weights else None
    return {
        "text_weight": s.ce_loss_weight,
        "bce_weight": s.bce_loss_weight,
        "dice_weight": s.dice_loss_weight,
        "bce_balance": s.bce_balance,
        "pointing_weight": s.pointing_weight,
        "pointing_host": s.pointing_host,
        "level_loss_weights": levels or [0.0] * (len(s.level_list) - 1) + [1.0],
        "ignore_in_loss": s.ignore_in_loss,
    }


def check_facts(
    s: Settings, model: CoresForReasoningSegmentation, processor: CoresProcessor
) -> None:
    """Flags of the published scripts that state what the weights decide. Raises UsageError if they
    contradict."""
    truth = {
        "image_size": model.config.sam["image_size"],
        "out_dim": model.config.sam["prompt_dim"],
    }
    for name, value in s.facts.items():
        if name in truth and value != truth[name]:
            raise UsageError(
                f"--{name} {value}: the SAM of {s.vision_pretrained or s.version} has"
                f" {truth[name]}; leave the flag out"
            )
    marked = (
        str(s.facts.get("use_mm_start_end", processor.image_marks is not None)).lower() == "true"
    )
    if marked != (processor.image_marks is not None):
        found = (
            "has <im_start> and <im_end>"
            if processor.image_marks
            else "has no <im_start> and <im_end>"
        )
        raise UsageError(
            f"--use_mm_start_end {str(marked).lower()}: the tokenizer of {s.version} {found}; leave"
            " the flag out"
        )
    found = model.config.llava.vision_config
    if s.vision_tower and _tower_sizes(s.vision_tower) != (
        found.hidden_size,
        found.patch_size,
        found.image_size,
    ):
        raise UsageError(
            f"--vision-tower {s.vision_tower}: the tower is part of {s.version}, which has width"
            f" {found.hidden_size}, patches of {found.patch_size} and images of {found.image_size}"
            " pixels; leave the flag out"
        )


def refuse_half_on_cpu(s: Settings) -> None:
    if s.precision == "fp16" and not torch.cuda.is_available():
        raise UsageError("--precision fp16 needs a GPU; use fp32 or bf16 here")


def _tower_sizes(tower: str) -> tuple[int, int, int]:
    """Hidden size, patch size and image size. Raises UsageError for a tower that cannot be
    found."""
    if tower in VISION_TOWERS:
        return VISION_TOWERS[tower]
    try:
        config = published.tower_config(tower)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"--vision-tower {tower}: {error}; leave the flag out") from None
    return config.hidden_size, config.patch_size, config.image_size


def load_for_evaluation(s: Settings) -> tuple[CoresForReasoningSegmentation, CoresProcessor]:
    """The model of the run --resume, or the merged --version. Raises UsageError for a backbone."""
    if s.resume:
        model, processor, _ = build_trained(
            s.run_dir if s.resume == "auto" else s.resume, precision=s.precision
        )
    elif is_merged(s.version):
        s.levels = ",".join(finished_processor(s).levels)
        model, processor = build_model(s)
    else:
        raise UsageError(
            f"--eval_only: {s.version} is a backbone without a mask branch; give a merged --version"
            " or --resume RUN"
        )
    processor.proposals = select_as(model, s)
    return model, processor


def make_trainable(model: CoresForReasoningSegmentation, s: Settings) -> dict[str, int]:
    """Adds LoRA and freezes the rest; returns the sizes of the trainable groups."""
    if s.lora_r:
        add_lora(
            model, s.lora_r, s.lora_alpha, s.lora_dropout, tuple(s.lora_target_modules.split(","))
        )
    if s.gradient_checkpointing:
        enable_checkpointing(model.reasoning.llava)
    return set_trainable(model, lora=bool(s.lora_r), train_mask_decoder=s.train_mask_decoder)


def build_trained(
    run: str | Path, which: str = "best", precision: str | None = None
) -> tuple[CoresForReasoningSegmentation, CoresProcessor, Settings]:
    """The model of a run folder, or of one of its checkpoints, with its trained weights and
    adapters still apart.

    ``precision``: of the weights, instead of the run's. Raises UsageError if there is no such
    checkpoint.
    """
    settings = settings_of(read_resumed(run))
    folder = checkpoint.find_checkpoint(run, which)
    settings.precision = precision or settings.precision
    model, processor = build_model(settings)
    make_trainable(model, settings)
    checkpoint.load_weights(model, folder)
    return model.eval(), processor, settings


def build_merging(
    run: str | Path, which: str, precision: str | None, rest: list[str]
) -> tuple[CoresForReasoningSegmentation, CoresProcessor]:
    """The model of a run folder in the precision to store, its adapters apart in float32.

    ``rest``: flags of train_ds.py on top of the run's settings. They may say where things are now;
    a UsageError refuses those that would make other weights of them.
    """
    saved = read_resumed(run)
    settings = parse_over(saved, rest)
    for name in sorted(saved.keys() - FREE_IN_MERGE):
        if getattr(settings, name, saved[name]) != saved[name]:
            now = getattr(settings, name)
            raise UsageError(
                f"--{name} {now}: the run {run} was trained with {saved[name]}; leave the flag out"
            )
    _refuse_other_kind(saved, settings, run)
    settings.precision = precision or settings.precision
    model, processor = _unmerged(settings)
    checkpoint.load_weights(model, checkpoint.find_weights(run, which))
    return model.eval(), processor


def _refuse_other_kind(saved: dict[str, Any], settings: Settings, run: str | Path) -> None:
    """Raises UsageError where --version is a merged model and the run was trained on a backbone, or
    the other way round."""
    moved = settings.version != saved["version"]
    on_backbone = saved["vision_pretrained"] and not (
        Path(saved["version"]).exists() and is_merged(saved["version"])
    )
    if moved and not saved["vision_pretrained"] and not is_merged(settings.version):
        raise UsageError(
            f"--version {settings.version}: is a backbone; the run {run} went on from the model"
            f" {saved['version']}"
        )
    if moved and on_backbone and is_merged(settings.version):
        raise UsageError(
            f"--version {settings.version}: is merged already; the run {run} was trained on the"
            f" backbone {saved['version']}"
        )


def build_from_source(
    source: Path, precision: str, rest: list[str]
) -> tuple[CoresForReasoningSegmentation, CoresProcessor]:
    """As ``build_merging``, for trained weights without a run folder: ``rest`` must describe the
    model they belong to."""
    weights = checkpoint.read_weights(source)
    settings = parse_over({}, rest)
    settings.precision = precision
    if not checkpoint.is_adapter(source):
        if settings.lora_r and not _given("lora_alpha", rest):
            print(
                f"{source}: does not say with which α it was trained; --lora_alpha"
                f" {settings.lora_alpha} is taken"
            )
        model, processor = _unmerged(settings)
        checkpoint.put_weights(model, weights, source)
        return model.eval(), processor
    if not is_merged(settings.version):
        raise UsageError(
            f"{source}: an adapter holds no mask branch, so --version must be a finished model, not"
            " a backbone"
        )
    adapter = read_json_file(source, checkpoint.ADAPTER_CONFIG)
    checkpoint.refuse_other_adapters(adapter, source)
    for name, key in (("lora_r", "r"), ("lora_alpha", "lora_alpha")):
        if _given(name, rest) and getattr(settings, name) != adapter.get(key):
            raise UsageError(
                f"--{name} {getattr(settings, name)}: {source} says {adapter.get(key)}; leave the"
                " flag out"
            )
        setattr(settings, name, adapter.get(key))
    settings.lora_target_modules = ",".join(adapter["target_modules"])
    settings.levels = ",".join(finished_processor(settings).levels)
    model, processor = _unmerged(settings)
    load_adapter(model, weights, source)
    return model.eval(), processor


def _given(name: str, flags: list[str]) -> bool:
    return any(flag.split("=")[0] == f"--{name}" for flag in flags)


def _unmerged(s: Settings) -> tuple[CoresForReasoningSegmentation, CoresProcessor]:
    """Weights in full precision of ``s.precision``, never in 4 or 8 bits, adapters in float32:
    nothing is rounded twice."""
    s.load_in_4bit = s.load_in_8bit = False
    s.attn_implementation = "eager"  # nothing is computed
    model, processor = build_model(s)
    make_trainable(model, s)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model, processor


def build_mixture(s: Settings, prompt: PromptFormat | CoresProcessor) -> TrainMixture:
    return TrainMixture(
        s.dataset_dir,
        s.dataset,
        numbers(s.sample_rates, "--sample_rates"),
        prompt.levels,
        samples_per_epoch(s),
        seed=s.seed,
        exemplar_count=prompt.exemplar_count,
        num_classes_per_sample=s.num_classes_per_sample,
        sem_seg_data=s.sem_seg_data,
        refer_seg_data=s.refer_seg_data,
        coco_data=s.coco_data,
        reason_seg_data=s.reason_seg_data,
        vqa_data=s.vqa_data,
        explanatory=s.explanatory,
        on_bad_sample=s.on_bad_sample,
        exclude_val=s.exclude_val,
        own_data=s.own_data,
        skip_list=s.skip_list,
        report=s.run_dir / "skipped.jsonl",
    )


def build_eval(s: Settings, prompt: PromptFormat | CoresProcessor) -> EvalDataset:
    return EvalDataset(
        s.dataset_dir,
        s.val_dataset,
        prompt.levels,
        prompt.exemplar_count,
        seed=s.seed,
        texts=s.eval_texts,
    )

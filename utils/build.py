"""From settings to parts: model and processor, training mixture, evaluation set."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from segment_anything.modeling import Sam
from torch import Tensor
from transformers import CLIPVisionConfig

from cores.dataset.files.faults import SKIPPED
from cores.dataset.mixture import EvalDataset, TrainMixture
from cores.dataset.proposals import ProposalSource
from cores.model.build import build_from_backbones
from cores.model.checkpoints.precision import (
    DTYPES,
    choose_attention,
    leave_small_layers,
    quantization,
)
from cores.model.checkpoints.published import clip_sizes
from cores.model.checkpoints.sam import load_sam
from cores.model.checkpoints.source import Kind, Source, open_source, open_tower
from cores.model.cores import CoresForReasoningSegmentation
from cores.model.processor import CoresProcessor
from cores.model.reasoning.chain import enable_checkpointing
from cores.model.reasoning.lora import add_lora, load_adapter
from cores.model.reasoning.prefix_sharing import PrefixSharing
from cores.model.segmenting.embedding_cache import SamCache, encoder_fingerprint
from cores.model.trainable import set_trainable
from cores.utils import distributed, identity
from cores.utils.settings.arguments import (
    Settings,
    numbers,
    read_resumed,
    refuse_no_version,
    settings_of,
)
from cores.utils.settings.flags import SELECTING, UsageError
from cores.utils.training import checkpoint
from cores.utils.training.loader import samples_per_epoch

# name: hidden size, patch size, image size
VISION_TOWERS = {
    "openai/clip-vit-large-patch14": (1024, 14, 224),
    "openai/clip-vit-large-patch14-336": (1024, 14, 336),
}


def open_version(s: Settings) -> Source:
    """What --version names, opened once for all that follows. Raises FileNotFoundError, and
    ValueError for what is neither a LLaVA nor a finished model."""
    refuse_no_version(s)
    try:
        source = open_source(s.version, s.vision_tower)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} (--version)") from None
    if not source.finished and source.kind not in (Kind.LLAVA, Kind.PUBLISHED_LLAVA):
        raise source.refuse("--version needs a model of type 'llava'")
    return source


def is_finished(path: str | Path) -> bool:
    """Whether ``path`` holds a finished model, ours or a published LISA or CoReS. What cannot be
    read holds none: whoever opens it in earnest will say why."""
    try:
        return open_source(path).finished
    except (FileNotFoundError, ValueError):
        return False


class PromptFormat(NamedTuple):
    """What data sets need to know of a model, without loading it."""

    levels: list[str]
    exemplar_count: int


def prompt_format(s: Settings, source: Source | None = None) -> PromptFormat:
    """Raises UsageError if a model's files are not there, before anything large is read."""
    source = source or open_version(s)
    if source.finished:
        processor = finished_processor(s, source)
        return PromptFormat(processor.levels, processor.exemplar_count)
    if not s.vision_pretrained:
        raise UsageError(
            f"{s.version}: is no merged model, so --vision_pretrained must name a SAM checkpoint"
        )
    if not Path(s.vision_pretrained).exists():
        raise UsageError(f"{s.vision_pretrained}: no such SAM checkpoint (--vision_pretrained)")
    return PromptFormat(s.level_list, s.exemplar_count)


def build_model(
    s: Settings, source: Source | None = None
) -> tuple[CoresForReasoningSegmentation, CoresProcessor]:
    """The model that the settings ask for, by one of three ways in: a new model from backbones, a
    finished model (to evaluate, or to go on from), or an unmerged run (to evaluate --resume).

    Weights are in --precision and nothing is trainable yet. ``source``: of --version, if it has
    been opened.
    """
    if s.eval_only and s.resume:
        run = s.run_dir if s.resume == "auto" else s.resume
        model, processor, _ = build_trained(
            run, precision=s.precision, accept_changes=s.accept_changes, places=s
        )
        processor.proposals = select_as(model, s)
        return model, processor
    source = source or open_version(s)
    loading: dict[str, Any] = {"dtype": DTYPES[s.precision]}
    if s.bits:
        loading["quantization_config"] = quantization(s.bits, DTYPES[s.precision])
    if source.finished:
        model, processor = _finished_model(s, source, loading)
    elif s.eval_only:
        raise UsageError(
            f"--eval_only: {s.version} is a backbone without a mask branch; give a merged --version"
            " or --resume RUN"
        )
    else:
        model, processor = _new_model(s, source, loading)
    leave_small_layers(model)
    check_facts(s, model, processor)
    set_speed(model, processor, s)
    if s.eval_only:
        processor.proposals = select_as(model, s)
    else:
        # Data loading processes have no network: with workers, training reads the store only.
        processor.proposals = model.proposal_source(s.proposals or None, generate=s.workers == 0)
    return model, processor


def _new_model(
    s: Settings, source: Source, loading: dict[str, Any]
) -> tuple[CoresForReasoningSegmentation, CoresProcessor]:
    prompt_format(s, source)  # It names the files that are missing.
    refiner = {"prototypes": s.refiner, "pooling": s.pooling}
    return build_from_backbones(
        source,
        s.vision_pretrained,
        s.level_list,
        template=s.conv_type,
        exemplar_count=s.exemplar_count,
        model_max_length=s.model_max_length,
        refiner={"kind": "none"} if s.refiner == "none" else refiner,
        text_projection_norm=s.text_projection_norm,
        system=s.system_prompt or None,
        features_pretrained=s.features_pretrained or None,
        selector=selector_config(s),
        **loading,
        **loss_config(s),
    )


def _finished_model(
    s: Settings, source: Source, loading: dict[str, Any]
) -> tuple[CoresForReasoningSegmentation, CoresProcessor]:
    processor = finished_processor(s, source)
    if s.eval_only:
        s.levels = ",".join(processor.levels)
    elif processor.levels != s.level_list:
        raise UsageError(
            f"{s.version}: was trained with the levels {','.join(processor.levels)}, --levels"
            f" says {s.levels}"
        )
    model = CoresForReasoningSegmentation.from_pretrained(source, **loading)
    processor.tokenizer.model_max_length = s.model_max_length
    model.config.set_losses(**loss_config(s))
    if not s.eval_only:
        refuse_other_method(s, model)
    return model, processor


def build_trained(
    run: str | Path,
    which: str = "best",
    precision: str | None = None,
    accept_changes: bool = False,
    places: Settings | None = None,
) -> tuple[CoresForReasoningSegmentation, CoresProcessor, Settings]:
    """The unmerged model of a run folder, or of one of its checkpoints, and its settings.

    ``precision``: of the weights, instead of the run's. ``places``: settings that say where its
    backbones are now, as a run may have been trained from another folder. Raises UsageError if
    there is no such checkpoint, or if it belongs to other backbones and ``accept_changes`` is not
    set.
    """
    settings = settings_of(read_resumed(run))
    settings.precision = precision or settings.precision
    settings.accept_changes = accept_changes
    for name in ("version", "vision_pretrained", "vision_tower", "features_pretrained"):
        if places is not None:
            setattr(settings, name, getattr(places, name))
    folder = checkpoint.find_checkpoint(run, which)
    return *unmerged_model(settings, checkpoint.read_weights(folder), folder), settings


def unmerged_model(
    s: Settings, weights: dict[str, Tensor], origin: Path, to_merge: bool = False
) -> tuple[CoresForReasoningSegmentation, CoresProcessor]:
    """The model that ``s`` describes with trained ``weights`` in it and its adapters apart, in
    evaluation mode.

    ``weights``: as ``checkpoint.read_weights`` reads them from ``origin``, which errors name.
    ``to_merge``: nothing is rounded twice, so weights are held in full --precision, never in 4 or 8
    bits, and adapters in float32.
    """
    if to_merge:
        s.load_in_4bit = s.load_in_8bit = False
        s.attn_implementation = "eager"  # Nothing is computed.
    source = open_version(s)
    if (origin / checkpoint.PROGRESS).is_file():  # Ours: it knows what it was trained on.
        weights_now = {"weights": identity.of_weights(s, source)}
        identity.refuse_changes(origin, weights_now, s, "putting the trained weights into it")
    model, processor = build_model(s, source)
    make_trainable(model, s)
    if to_merge:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    put = load_adapter if checkpoint.is_adapter(origin) else checkpoint.put_weights
    put(model, weights, origin)
    return model.eval(), processor


def refuse_other_method(s: Settings, model: CoresForReasoningSegmentation) -> None:
    """Raises UsageError if training would go on from a model of a method that another mask branch
    belongs to."""
    if model.selecting is None:
        found, methods = "a CoReS or LISA", {"cores", "lisa"}
    elif model.config.decodes:
        found, methods = "a CoReS with a selector", {"cores+select"}
    else:
        found, methods = "an LLM-Seg", {"llm_seg"}
    if s.method not in methods:
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
        processor.sam_cache = open_sam_cache(s, model.segmenting.sam, processor.image_size)
        model.segmenting.store_embedding = processor.sam_cache.store


def open_sam_cache(s: Settings, sam: Sam, image_size: int) -> SamCache:
    """The cache of --sam_cache for the embeddings of ``sam``."""
    name = encoder_fingerprint(sam.image_encoder, image_size)
    shape = sam.prompt_encoder.embed_dim, *sam.prompt_encoder.image_embedding_size
    return SamCache(s.sam_cache, name, s.sam_cache_dtype, s.sam_cache_gb, shape)


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


def build_sam_only(s: Settings, source: Source) -> tuple[Sam, int]:
    """The SAM that these settings train with, in --precision, and its image size. ``source``: of
    --version."""
    if source.finished:
        model, processor = build_model(s, source)
        return model.segmenting.sam, processor.image_size
    sam, dims = load_sam(s.vision_pretrained)
    return sam.to(DTYPES[s.precision]), dims.image_size


def finished_processor(s: Settings, source: Source) -> CoresProcessor:
    """Of a finished model; --conv_type and --system_prompt speak for a published one, whose files
    say neither."""
    processor = CoresProcessor.from_pretrained(source, template=s.conv_type)
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
    width, patch, side = clip_sizes(model.config.llava.vision_config)
    if s.vision_tower and _tower_sizes(s.vision_tower) != (width, patch, side):
        raise UsageError(
            f"--vision-tower {s.vision_tower}: the tower is part of {s.version}, which has width"
            f" {width}, patches of {patch} and images of {side} pixels; leave the flag out"
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
        return clip_sizes(CLIPVisionConfig.from_pretrained(open_tower(tower).folder))
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"--vision-tower {tower}: {error}; leave the flag out") from None


def make_trainable(model: CoresForReasoningSegmentation, s: Settings) -> dict[str, int]:
    """Adds LoRA and freezes the rest; returns the sizes of the trainable groups."""
    if s.lora_r:
        targets = [name.strip() for name in s.lora_target_modules.split(",")]
        scale = s.lora_r, s.lora_alpha, s.lora_dropout
        add_lora(model, *scale, targets, s.use_dora, s.use_rslora)
    if s.gradient_checkpointing:
        enable_checkpointing(model.reasoning.llava)
    return set_trainable(model, lora=bool(s.lora_r), train_mask_decoder=s.train_mask_decoder)


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
        report=s.run_dir / SKIPPED,
        follow_links=s.follow_links,
    )


def build_eval(s: Settings, prompt: PromptFormat | CoresProcessor) -> EvalDataset:
    return EvalDataset(
        s.dataset_dir,
        s.val_dataset,
        prompt.levels,
        prompt.exemplar_count,
        seed=s.seed,
        texts=s.eval_texts,
        follow_links=s.follow_links,
    )

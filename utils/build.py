"""From settings to parts: model and processor, training mixture, evaluation set."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from dataset.mixture import EvalDataset, TrainMixture
from dataset.proposals import ProposalSource
from model.cores import CoresForReasoningSegmentation
from model.lora import add_lora, set_trainable
from model.processor import FILE as PROCESSOR_FILE
from model.processor import CoresProcessor
from utils import checkpoint
from utils.arguments import Settings, UsageError, numbers, read_resumed, settings_of
from utils.engine import DTYPES, samples_per_epoch

# name: hidden size, patch size, image size
VISION_TOWERS = {
    "openai/clip-vit-large-patch14": (1024, 14, 224),
    "openai/clip-vit-large-patch14-336": (1024, 14, 336),
}


def is_merged(version: str) -> bool:
    """Whether ``version`` is a folder of a finished model rather than a backbone."""
    return (Path(version) / PROCESSOR_FILE).is_file()


class PromptFormat(NamedTuple):
    """What data sets need to know of a model, without loading it."""

    levels: list[str]
    exemplar_count: int


def prompt_format(s: Settings) -> PromptFormat:
    """Raises UsageError if a model's files are not there, before anything large is read."""
    if is_merged(s.version):
        processor = CoresProcessor.from_pretrained(s.version)
        return PromptFormat(processor.levels, processor.exemplar_count)
    if not s.vision_pretrained:
        raise UsageError(f"{s.version}: is no merged model, so --vision_pretrained must name a SAM checkpoint")
    if not Path(s.vision_pretrained).exists():
        raise UsageError(f"{s.vision_pretrained}: no such SAM checkpoint (--vision_pretrained)")
    return PromptFormat(s.level_list, s.exemplar_count)


def build_model(s: Settings) -> tuple[CoresForReasoningSegmentation, CoresProcessor]:
    """A new model from backbones, or a merged one to go on from; weights in --precision, nothing trainable yet."""
    if is_merged(s.version):
        processor = CoresProcessor.from_pretrained(s.version)
        if processor.levels != s.level_list:
            raise UsageError(f"{s.version}: was trained with the levels {','.join(processor.levels)}, --levels says {s.levels}")
        model = CoresForReasoningSegmentation.from_pretrained(s.version, dtype=DTYPES[s.precision])
        processor.tokenizer.model_max_length = s.model_max_length
        for name, value in loss_config(s).items():
            setattr(model.config, name, value)
        if (model.selecting is None) == (s.method == "llm_seg") and not s.eval_only:
            found = "an LLM-Seg" if model.selecting else "no LLM-Seg"
            raise UsageError(f"{s.version}: is {found}, --method says {s.method}")
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
            refiner={"kind": "none"} if s.refiner == "none" else {"prototypes": s.refiner, "pooling": s.pooling},
            text_projection_norm=s.text_projection_norm,
            features_pretrained=s.features_pretrained or None,
            selector=selector_config(s),
            **loss_config(s),
        )
    check_facts(s, model)
    # data loading processes have no network: with workers, training reads the store only
    processor.proposals = model.proposal_source(s.proposals or None, generate=s.workers == 0)
    return model, processor


def selector_config(s: Settings) -> dict | None:
    """Fields of SelectorConfig, or None for a method that decodes its masks."""
    if s.method != "llm_seg":
        return None
    return {
        "features": s.features,
        "rule": s.select or "iop",
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
    """For evaluation: the rule of --select, if it is set; proposals from --proposals, and what is missing there is computed."""
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


def check_facts(s: Settings, model: CoresForReasoningSegmentation) -> None:
    """Flags of the published scripts that state what the weights decide. Raises UsageError if they contradict."""
    truth = {"image_size": model.config.sam["image_size"], "out_dim": model.config.sam["prompt_dim"]}
    for name, value in s.facts.items():
        if name in truth and value != truth[name]:
            raise UsageError(
                f"--{name} {value}: the SAM of {s.vision_pretrained or s.version} has {truth[name]}; leave the flag out"
            )
    if str(s.facts.get("use_mm_start_end", "false")).lower() != "false":
        raise UsageError("--use_mm_start_end: LLaVA in transformers format has no start and end tokens; leave the flag out")
    tower = s.facts.get("vision_tower")
    found = model.config.llava.vision_config
    if tower is not None and VISION_TOWERS.get(tower) != (found.hidden_size, found.patch_size, found.image_size):
        raise UsageError(
            f"--vision-tower {tower}: the tower is part of {s.version}, which has width {found.hidden_size}, patches "
            f"of {found.patch_size} and images of {found.image_size} pixels; leave the flag out"
        )


def make_trainable(model: CoresForReasoningSegmentation, s: Settings) -> dict[str, int]:
    """Adds LoRA and freezes the rest; returns the sizes of the trainable groups."""
    if s.lora_r:
        add_lora(model, s.lora_r, s.lora_alpha, s.lora_dropout, tuple(s.lora_target_modules.split(",")))
    if s.gradient_checkpointing:
        model.reasoning.llava.gradient_checkpointing_enable({"use_reentrant": False})
        model.reasoning.llava.enable_input_require_grads()
    return set_trainable(model, lora=bool(s.lora_r), train_mask_decoder=s.train_mask_decoder)


def build_trained(
    run: str | Path, which: str = "best", precision: str | None = None
) -> tuple[CoresForReasoningSegmentation, CoresProcessor, Settings]:
    """The model of a run folder, or of one of its checkpoints, with its trained weights and adapters still apart.

    ``precision``: of the weights, instead of the run's. Raises UsageError if there is no such checkpoint.
    """
    settings = settings_of(read_resumed(run))
    folder = checkpoint.find_checkpoint(run, which)
    settings.precision = precision or settings.precision
    model, processor = build_model(settings)
    make_trainable(model, settings)
    checkpoint.load_weights(model, folder)
    return model.eval(), processor, settings


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
        coco_data=s.coco_data,
        reason_seg_data=s.reason_seg_data,
        vqa_data=s.vqa_data,
        explanatory=s.explanatory,
        on_bad_sample=s.on_bad_sample,
    )


def build_eval(s: Settings, prompt: PromptFormat | CoresProcessor) -> EvalDataset:
    return EvalDataset(s.dataset_dir, s.val_dataset, prompt.levels, prompt.exemplar_count, seed=s.seed, texts=s.eval_texts)

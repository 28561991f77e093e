"""Every flag of the command line, in small dataclasses by concern."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cores.dataset.conversation.templates import TEMPLATES
from cores.model.choices import ATTENTION, PRECISIONS, RANKINGS, RULES

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
SELECTING = ("llm_seg", "cores+select")  # methods that choose among SAM's proposals


class UsageError(ValueError):
    """A wrong flag, value or file: shown as one line, exit code 2."""


def option(
    default: Any,
    help: str,
    *aliases: str,
    choices: list | None = None,
    minimum: float | None = 0,
    maximum: float | None = None,
    may_change: bool = False,
) -> Any:
    """A flag. ``minimum``, ``maximum``: of a number, which is finite in any case. ``may_change``: a
    run may be continued with another value, because the flag only says where things are, how fast
    they go, or how they are shown."""
    facts = {"help": help, "aliases": aliases, "choices": choices, "may_change": may_change}
    return field(default=default, metadata=facts | {"minimum": minimum, "maximum": maximum})


@dataclass
class ModelArguments:
    version: str = option(
        "", "LLaVA folder or hub name; or a merged model; needed unless a config or a run names one"
    )
    vision_tower: str = option(
        "", "CLIP of a LLaVA or LISA that does not hold its own; else checked", "--vision-tower"
    )
    vision_pretrained: str = option(
        "", "SAM checkpoint (.pth) or folder; not needed for a merged model"
    )
    method: str = option(
        "cores",
        "lisa: one token [SEG], no refiner, no exemplar; llm_seg: likewise, and selects among SAM's"
        " proposals; cores+select: CoReS, whose last mask stands among SAM's proposals, and"
        " LLM-Seg's selector chooses",
        choices=["cores", "lisa", *SELECTING],
    )
    levels: str = option("LOC,SEG", "answer tokens of the chain, coarse to fine, joined by commas")
    refiner: str = option(
        "foreground",
        "what the token refiner attends to",
        choices=["none", "foreground", "foreground+background", "regions"],
    )
    pooling: str = option("soft", "masked average pooling of the refiner", choices=["soft", "hard"])
    text_projection_norm: float | None = option(
        None, "norm of the projected tokens, a number above 0; none: LISA's plain projection"
    )
    conv_type: str = option("llava_v1", "conversation template", choices=list(TEMPLATES))
    exemplar_count: int = option(1, "in-context exemplars before the question")
    model_max_length: int = option(512, "longest sequence in tokens", minimum=1)
    precision: str = option("bf16", "floating-point format", choices=list(PRECISIONS))
    load_in_8bit: bool = option(
        False, "hold the language model in 8 bits per weight; the mask branch stays in full"
    )
    load_in_4bit: bool = option(
        False, "hold the language model in 4 bits per weight (QLoRA when it trains)"
    )
    system_prompt: str = option("", "system text in place of the template's")
    lora_r: int = option(8, "rank of LoRA; 0: no adapters")
    lora_alpha: int = option(16, "LoRA's scale is alpha / r", minimum=1)
    lora_dropout: float = option(0.05, "dropout in front of LoRA", maximum=1)
    lora_target_modules: str = option(
        "q_proj,v_proj",
        "layers of the language model that get LoRA, joined by commas; all-linear: all of them",
    )
    use_dora: bool = option(
        False, "DoRA: adapters also learn the length of every row of the merged weight"
    )
    use_rslora: bool = option(False, "rank-stabilised LoRA: its scale is alpha / √r")
    train_mask_decoder: bool = option(True, "train SAM's mask decoder")
    gradient_checkpointing: bool = option(
        True, "recompute the language model's activations instead of keeping them"
    )


@dataclass
class SelectArguments:
    """LLM-Seg's branch, of llm_seg and cores+select; of no effect for other methods."""

    features: str = option(
        "dinov2",
        "features under the proposals: a DINOv2 of its own, or SAM's embedding",
        choices=["dinov2", "sam"],
    )
    features_pretrained: str = option(
        "", "DINOv2 in transformers format, such as facebook/dinov2-large"
    )
    proposal_place: bool = option(
        False,
        "proposals know where they are: SAM's positional encoding is pooled, too (paper: off)",
    )
    select: str = option(
        "",
        "which proposals are united; unset: iop, with cores+select similarity, or a merged model's"
        " own rule",
        choices=["", *RULES],
        may_change=True,
    )
    proposals: str = option(
        "",
        "folder of the proposal store, see utils/precompute/proposals.py; unset: computed whenever"
        " needed",
        may_change=True,
    )
    proposal_ranking: str = option(
        "area",
        "which proposals are kept: the largest, the surest, or both in turns",
        choices=list(RANKINGS),
    )
    proposal_count: int = option(50, "proposals kept per image", minimum=1)
    proposal_points: int = option(32, "points that prompt SAM, per side of the image", minimum=1)
    proposal_iou: float = option(0.88, "lowest IoU that SAM may expect of a proposal", maximum=1)
    proposal_stability: float = option(0.95, "lowest stability of a proposal", maximum=1)
    proposal_multimask: bool = option(
        True, "three proposals per point; off for a SAM that knows its single-mask token only"
    )
    pool_size: int = option(
        256, "side to which features and proposals are resized for pooling", minimum=1
    )


@dataclass
class LossArguments:
    ce_loss_weight: float = option(1.0, "weight of the text loss")
    bce_loss_weight: float = option(2.0, "weight of the mask's binary cross-entropy")
    dice_loss_weight: float = option(0.5, "weight of the DICE loss")
    bce_balance: bool = option(
        False, "half of the BCE weight on the target, half on the rest (paper: off)"
    )
    pointing_weight: float = option(0.0, "weight of the pointing loss (paper: 0)")
    pointing_host: bool = option(False, "earlier tokens point at the host, where data know it")
    level_loss_weights: str = option(
        "", "mask loss weight of every level, joined by commas; unset: only the last, 1"
    )
    loss_normalisation: str = option(
        "global",
        "losses are means over all tokens and targets of an optimizer step, or of each micro batch"
        " (published code)",
        choices=["global", "micro"],
    )
    ignore_in_loss: bool = option(
        True, "leave ignored pixels out of the loss (published code: background)"
    )


@dataclass
class DataArguments:
    dataset_dir: str = option("./data", "root of all data sets, in LISA's layout", may_change=True)
    dataset: str = option("sem_seg||reason_seg", "families to train on, joined by ||")
    sample_rates: str = option(
        "9,1", "how often each family is drawn; alike where --dataset is given without it"
    )
    sem_seg_data: str = option("ade20k", "semantic data sets, joined by ||")
    refer_seg_data: str = option(
        "refclef||refcoco||refcoco+||refcocog", "referring data sets, joined by ||"
    )
    coco_data: str = option("train2017", "splits of COCO instances, joined by ||")
    reason_seg_data: str = option("ReasonSeg|train", "reasoning data sets, joined by ||")
    vqa_data: str = option("llava_instruct_150k", "VQA file under llava_dataset/")
    own_data: str = option(
        "", "your own data sets under own/, name or name|split, joined by ||; see docs/data.md"
    )
    val_dataset: str = option("ReasonSeg|val", "evaluation set, name|split", may_change=True)
    explanatory: float = option(
        0.1,
        "probability that a query with a known explanation asks for it; LISA's -1: never",
        minimum=-1,
        maximum=1,
    )
    num_classes_per_sample: int = option(3, "most conversations per image", minimum=1)
    exclude_val: bool = option(
        False,
        "never train on COCO's photos in the val and test splits of refCOCO, refCOCO+ and refCOCOg",
    )
    on_bad_sample: str = option(
        "raise",
        "a file that cannot be used stops the run or is replaced",
        choices=["raise", "skip"],
    )
    skip_list: str = option(
        "",
        "file of items to leave out of the training data, as `python -m dataset.check --fix-list`"
        " writes it",
    )
    follow_links: bool = option(
        False,
        "data files may be links that lead out of the data folder, as in the hub's cache",
        may_change=True,
    )
    workers: int = option(4, "data loading processes per rank", maximum=1000, may_change=True)


@dataclass
class TrainArguments:
    exp_name: str = option("cores", "name of the run", may_change=True)
    log_base_dir: str = option("./runs", "where runs are kept", may_change=True)
    epochs: int = option(10, "epochs", minimum=1)
    steps_per_epoch: int = option(500, "optimizer steps per epoch", minimum=1)
    batch_size: int = option(2, "images per rank and micro step", minimum=1, maximum=100_000)
    grad_accumulation_steps: int = option(10, "micro steps per optimizer step", minimum=1)
    global_batch_size: int = option(
        0,
        "images per optimizer step of all ranks together; sets grad_accumulation_steps. 0: unset",
    )
    lr: float = option(3e-4, "peak learning rate")
    loraplus_lr_ratio: float = option(
        1.0, "LoRA+: learning rate of LoRA's B, as a multiple of --lr; 1: off", minimum=1
    )
    beta1: float = option(0.9, "AdamW β1", maximum=1)
    beta2: float = option(0.95, "AdamW β2", maximum=1)
    weight_decay: float = option(0.0, "AdamW weight decay")
    warmup_steps: int = option(
        100, "steps of linear warm-up, before the linear decay to 0", minimum=0
    )
    max_grad_norm: float = option(1.0, "gradient clipping")
    zero_stage: int = option(2, "DeepSpeed ZeRO stage", choices=[0, 1, 2, 3])
    offload: str = option(
        "none", "what the host holds and computes instead of the GPU", choices=["none", "optimizer"]
    )
    seed: int = option(0, "seed of everything", maximum=2**63 - 1)
    print_freq: int = option(
        10, "steps between two lines of the run log", minimum=1, may_change=True
    )
    report_to: str = option(
        "tensorboard",
        f"where the log is shown, too: {', '.join(TRACKERS)}, joined by commas; or none",
        may_change=True,
    )
    report_project: str = option(
        "",
        "project (MLflow: experiment) of the run there; unset: WANDB_PROJECT, TRACKIO_PROJECT or"
        " MLFLOW_EXPERIMENT_NAME, or else cores",
        may_change=True,
    )
    save_every: int = option(
        0,
        "steps between checkpoints inside an epoch; 0: only at its end",
        may_change=True,
    )
    resume: str = option(
        "",
        "run or checkpoint folder to continue, its settings are the defaults; auto: the same as"
        " --auto_resume",
        may_change=True,
    )
    auto_resume: bool = option(True, "continue this run if it has a checkpoint", may_change=True)
    accept_changes: bool = option(
        False,
        "go on although weights, data or versions are not those that the run was made of",
        may_change=True,
    )
    spike_factor: float = option(
        3.0,
        "a loss this many times the median of the last 50 steps is reported with its samples;"
        " 0: off",
        may_change=True,
    )
    start_epoch: int = option(
        0,
        "first epoch of a new run, counted from 0; data order and schedule start there",
    )
    no_eval: bool = option(False, "no evaluation after the epochs", may_change=True)
    eval_every: int = option(1, "epochs between evaluations", minimum=1, may_change=True)
    local_rank: int = option(0, "set by the launcher", minimum=-1)


@dataclass
class EvalArguments:
    """How a run is measured. All of it may change when the run is continued."""

    eval_only: bool = option(
        False, "no training: evaluate a merged --version, or the run given by --resume"
    )
    eval_mode: str = option(
        "both", "how the final evaluation answers", choices=["free", "teacher_forced", "both"]
    )
    val_batch_size: int = option(1, "images per rank in evaluation", minimum=1, maximum=100_000)
    eval_limit: int = option(
        0, "images of the evaluations between epochs, and of --eval_only; 0: all", minimum=0
    )
    eval_texts: str = option(
        "first", "wordings of a query that are scored", choices=["first", "all"]
    )
    max_new_tokens: int = option(64, "longest free answer, in tokens", minimum=1)
    save_masks: bool = option(
        False, "the final evaluation writes its masks, too: predictions-<mode>.json, for `score`"
    )
    examples: int = option(16, "rows of the contact sheet")
    gallery: int = option(
        8, "answers of each kind (worst, random, best, without a mask) in report.html", minimum=0
    )


@dataclass
class SpeedArguments:
    prefix_sharing: bool = option(
        True,
        "conversations of an image share its prompt; false: the published schedule, same results",
        may_change=True,
    )
    pack_tokens: int = option(
        0,
        "tokens that images may share a row up to; 0: what the largest image needs",
        may_change=True,
    )
    attn_implementation: str = option(
        "auto",
        "attention of the language model, see docs/performance.md",
        choices=list(ATTENTION),
        may_change=True,
    )
    compile: bool = option(
        False,
        "torch.compile SAM's image encoder: a minute at the start; on a CPU it needs a C++"
        " compiler",
        may_change=True,
    )
    sam_cache: str = option(
        "", "folder that keeps SAM's image embeddings; unset: computed every time", may_change=True
    )
    sam_cache_dtype: str = option("fp16", "how the cache stores numbers", choices=["fp16", "int8"])
    sam_cache_gb: float = option(
        0.0, "most that the cache may hold, in 10^9 bytes; 0: no limit", may_change=True
    )


GROUPS = (
    ModelArguments,
    SelectArguments,
    LossArguments,
    DataArguments,
    TrainArguments,
    EvalArguments,
    SpeedArguments,
)

"""The layouts in which the authors of LLaVA, LISA and CoReS publish their models, and their
translation to and from ours: names of weights and fields of config.json. It opens no file.

::

    LLaVA   model.layers.*  model.embed_tokens  model.norm  lm_head  model.mm_projector
            model.vision_tower.vision_tower.*
    LISA    the same, and model.visual_model.* (SAM), model.text_hidden_fcs.0.*, a token [SEG]
    CoReS   the same, and a token [SEG_SEMA] before [SEG]; one variant has a refiner,
            transformer_cross_attention_layers.*

They say ``"model_type": "llava"`` in config.json, as transformers' own LLaVA does, but name other
architectures, or, saved by today's code of LLaVA, "llava_llama". The CLIP tower is often left out;
then config.json names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
)

from cores.model.checkpoints.sam import detect_dims
from cores.model.config import CoresConfig, SamDims

HF_ARCHITECTURE = "LlavaForConditionalGeneration"
MODEL_TYPES = ("llava", "llava_llama")
"""What config.json of these layouts calls them."""
ARCHITECTURES = ("LlavaLlamaForCausalLM", "LISAForCausalLM", "CORESForCausalLM")
"""By which a fork is known whose model_type is one that nobody else has."""
IMAGE_MARKS = ("<im_start>", "<im_end>")
# A tokenizer may have the tokens of several chains; the longest is the one it was trained with.
LEVEL_CHAINS = (("SEG_SEMA", "SEG"), ("LOC", "SEG"), ("SEG",))
LLAVA = "reasoning.llava."
TOWER = f"{LLAVA}model.vision_tower."
PROJECTOR = f"{LLAVA}model.multi_modal_projector."
SAM = "segmenting.sam."
REFINER = "segmenting.refiner."

# (their prefix, our prefix); the first that fits counts.
PREFIXES = (
    ("model.visual_model.", SAM),
    ("model.text_hidden_fcs.0.", "text_projection."),
    ("model.mm_projector.", PROJECTOR),
    ("transformer_cross_attention_layers.multihead_attn.", f"{REFINER}attention."),
    ("transformer_cross_attention_layers.norm.", f"{REFINER}norm."),
    ("lm_head.", f"{LLAVA}lm_head."),
    ("model.", f"{LLAVA}model.language_model."),
)
# The second name is that of a tower which transformers 5 has saved.
THEIR_TOWERS = (
    "model.vision_tower.vision_tower.vision_model.",
    "model.vision_tower.vision_tower.",
)
# Fields of a LLaMA's config that both sides call alike; only rope_theta and rope_scaling, which
# transformers calls rope_parameters today, are translated apart.
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
LLAMA_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "attention_bias",
)
# Constants that old versions of transformers stored as weights; they follow from config.json.
LEFTOVERS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
MLP_LAYERS = {"0.": "linear_1.", "2.": "linear_2."}


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether a config.json belongs to one of these layouts rather than to transformers' own
    LLaVA."""
    architectures = config.get("architectures") or ()
    theirs = HF_ARCHITECTURE not in architectures and "text_config" not in config
    kind = config.get("model_type")
    of_fork = kind not in CONFIG_MAPPING and any(name in ARCHITECTURES for name in architectures)
    return theirs and (kind in MODEL_TYPES or of_fork)


def has_masks(names: Iterable[str]) -> bool:
    """Whether weights of these names are a LISA or CoReS rather than a LLaVA."""
    return any(name.startswith("model.visual_model.") for name in names)


@cache
def clip_prefix() -> str:
    """What this version of transformers puts before the names of a CLIP tower's weights: it changed
    over time."""
    smallest = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with torch.device("meta"):
        model = CLIPVisionModel(smallest)
    return "vision_model." if next(iter(model.state_dict())).startswith("vision_model.") else ""


def tower_renaming(names: Iterable[str]) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for weights of ours that another version of transformers
    saved; {} for the same."""
    theirs = any(".vision_tower.vision_model." in name for name in names)
    if theirs == bool(clip_prefix()):
        return {}
    old = "vision_model." if theirs else ""
    return {"key_mapping": {re.escape(f".vision_tower.{old}"): f".vision_tower.{clip_prefix()}"}}


def our_name(name: str, linear_projector: bool) -> str | None:
    """Our name of a published weight, None for a constant that needs no loading. Other names come
    back as they are."""
    if LEFTOVERS.search(name):
        return None
    for tower in THEIR_TOWERS:
        if name.startswith(tower):
            return TOWER + clip_prefix() + name.removeprefix(tower)
    for theirs, ours in PREFIXES:
        if name.startswith(theirs):
            rest = name.removeprefix(theirs)
            if ours != PROJECTOR:
                return ours + rest
            layer = "linear_1." if linear_projector else MLP_LAYERS.get(rest[:2], rest[:2])
            return ours + layer + (rest if linear_projector else rest[2:])
    return name


def their_name(name: str, linear_projector: bool) -> str:
    """The published name of one of our weights; inverse of ``our_name``. Raises ValueError where
    there is none."""
    if name.startswith(TOWER):
        return THEIR_TOWERS[0] + name.removeprefix(TOWER).removeprefix("vision_model.")
    if name.startswith(PROJECTOR):
        rest = name.removeprefix(PROJECTOR)
        if linear_projector:
            return "model.mm_projector." + rest.removeprefix("linear_1.")
        layers = {ours: theirs for theirs, ours in MLP_LAYERS.items()}
        return f"model.mm_projector.{layers[rest[:9]]}{rest[9:]}"
    for theirs, ours in PREFIXES:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"{name}: the published layout has no place for this weight")


def to_ours(weights: Mapping[str, Tensor], linear_projector: bool) -> dict[str, Tensor]:
    """Published weights under our names."""
    renamed = ((our_name(name, linear_projector), tensor) for name, tensor in weights.items())
    return {name: tensor for name, tensor in renamed if name is not None}


def says_linear_projector(config: Mapping[str, Any]) -> bool:
    """Whether the projector is one linear layer. Raises ValueError for a kind other than linear and
    mlp2x_gelu."""
    kind = config.get("mm_projector_type") or "linear"
    if kind not in ("linear", "mlp2x_gelu"):
        raise ValueError(f"mm_projector_type is {kind!r}; known are linear and mlp2x_gelu")
    return kind == "linear"


def sam_dims(weights: Mapping[str, Tensor], source: str | Path) -> SamDims:
    """The sizes of the SAM inside a LISA or CoReS. Raises ValueError where there is none."""
    prefix = "model.visual_model."
    return detect_dims(
        {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)},
        source,
    )


def levels_of_vocabulary(vocabulary: Mapping[str, int], source: str | Path) -> list[str]:
    """The chain whose tokens a tokenizer has. Raises ValueError where it has none."""
    for chain in LEVEL_CHAINS:
        if all(f"[{level}]" in vocabulary for level in chain):
            return list(chain)
    raise ValueError(
        f"{source}: the tokenizer has none of the tokens [SEG], [SEG_SEMA], [LOC]; it is no LISA or"
        " CoReS"
    )


def tower_name(config: Mapping[str, Any], source: str | Path) -> str:
    """Folder or hub name of the CLIP tower, as config.json says. Raises ValueError where it names
    none."""
    name = config.get("mm_vision_tower") or config.get("vision_tower")
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{source}: config.json names no mm_vision_tower; give --vision-tower,"
            " openai/clip-vit-large-patch14 say"
        )
    return name


def clip_sizes(vision: Any) -> tuple[int, int, int]:
    """Hidden size, patch size and image size, both in pixels, of a CLIPVisionConfig."""
    sizes = vision.hidden_size, vision.patch_size, vision.image_size
    assert all(isinstance(size, int) for size in sizes), "CLIP's patches and images are square"
    return sizes


def clip_tokens(vision: Any, with_class_token: bool) -> int:
    """Features that the CLIP of a CLIPVisionConfig gives for one image: one for each patch, and one
    for its class token."""
    _, patch, side = clip_sizes(vision)
    return (side // patch) ** 2 + with_class_token


def llava_config(
    config: Mapping[str, Any], vision: CLIPVisionConfig, rows: int, image_token_id: int
) -> LlavaConfig:
    """transformers' config of a published LLaVA. ``rows``: of its token table. Raises ValueError
    for what it cannot say."""
    if str(config.get("image_aspect_ratio", "")).startswith("anyres"):
        raise ValueError(
            f"image_aspect_ratio is {config['image_aspect_ratio']!r}: a LLaVA 1.6 (NeXT), which"
            " takes images apart into tiles; give a LLaVA 1.5 or 1"
        )
    select = config.get("mm_vision_select_feature") or "patch"
    if select not in ("patch", "cls_patch"):
        raise ValueError(f"mm_vision_select_feature is {select!r}; known are patch and cls_patch")
    text = {name: config[name] for name in LLAMA_FIELDS if name in config}
    text |= {name: config[name] for name in ROPE_FIELDS if config.get(name) is not None}
    linear = says_linear_projector(config)
    extra: dict[str, Any] = {
        "projector_layers": 1 if linear else 2
    }  # transformers has no such field.
    return LlavaConfig(
        text_config=LlamaConfig(**text, vocab_size=rows),
        vision_config=vision,
        image_token_index=image_token_id,
        image_seq_length=clip_tokens(vision, select == "cls_patch"),
        projector_hidden_act="linear" if linear else "gelu",
        vision_feature_select_strategy="default" if select == "patch" else "full",
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        **extra,
    )


def has_linear_projector(llava: LlavaConfig) -> bool:
    """``says_linear_projector`` for transformers' config as ``llava_config`` makes it."""
    return getattr(llava, "projector_layers", 2) == 1


def their_config(
    config: CoresConfig, architecture: str, tower: str, image_marks: bool
) -> dict[str, Any]:
    """A published config.json for one of our CoresConfigs. ``tower``: folder or hub name of its
    CLIP."""
    llava, text = config.llava, config.llava.get_text_config()
    rope = dict(text.rope_parameters or {})
    theta, kind = rope.pop("rope_theta", 10000.0), rope.pop("rope_type", "default")
    return {name: getattr(text, name) for name in LLAMA_FIELDS} | {
        "architectures": [architecture],
        "model_type": "llava",
        "vocab_size": text.vocab_size,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "mm_hidden_size": clip_sizes(llava.vision_config)[0],
        "mm_projector_type": "linear" if has_linear_projector(llava) else "mlp2x_gelu",
        "mm_vision_tower": tower,
        "mm_vision_select_layer": llava.vision_feature_layer,
        "mm_vision_select_feature": (
            "patch" if llava.vision_feature_select_strategy == "default" else "cls_patch"
        ),
        "mm_use_im_start_end": image_marks,
        "out_dim": config.sam["prompt_dim"],
        # These two fields are ours: neither the number of SAM's heads nor the use of a token leaves
        # a trace in the weights.
        "sam": config.sam,
        "levels": config.levels,
        "train_mask_decoder": True,
    }


def uses_image_marks(config: Mapping[str, Any], vocabulary: Mapping[str, int]) -> bool:
    """Whether the image stands between <im_start> and <im_end>. A LISA that does not say so was
    trained with them."""
    return (
        all(mark in vocabulary for mark in IMAGE_MARKS)
        and config.get("mm_use_im_start_end", True) is not False
    )

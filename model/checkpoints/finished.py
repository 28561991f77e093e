"""What ``from_pretrained`` of a finished model needs of a checkpoint: config, weights under our
names, and the format to hold them in."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig

from cores.model.checkpoints import published
from cores.model.checkpoints.llava import add_image_token, weights_with_tower
from cores.model.checkpoints.source import Kind, Source
from cores.model.checkpoints.weights import blaming
from cores.model.config import CoresConfig


def loading_arguments(source: Source, dtype: torch.dtype | str | None) -> dict[str, Any]:
    """``config``, ``state_dict``, ``dtype`` and ``key_mapping`` for transformers'
    ``from_pretrained``.

    ``dtype``: as there; "auto" is that of the stored weights. Raises ValueError for a checkpoint
    that is no whole model.
    """
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    if not source.finished:
        raise source.refuse(f"a merged model says model_type {CoresConfig.model_type!r}")
    if source.kind is Kind.PUBLISHED_CORES:
        return _of_published(source, dtype)
    config = loading_config(source)
    weights = source.hand_over_weights()
    renaming = published.tower_renaming(weights)
    return {"config": config, "state_dict": weights, "dtype": dtype} | renaming


def loading_config(source: Source) -> CoresConfig:
    """The config of a finished model. Raises ValueError for a checkpoint that is none."""
    if not source.finished:
        raise source.refuse(f"a merged model says model_type {CoresConfig.model_type!r}")
    if source.kind is Kind.PUBLISHED_CORES:
        return _config_of_published(source)
    with blaming(source.folder / "config.json"):
        config = CoresConfig.from_pretrained(source.folder)
        if config.level_token_ids is None:
            raise ValueError("level_token_ids is missing")
    return config


def _of_published(source: Source, dtype: torch.dtype | str | None) -> dict[str, Any]:
    if not isinstance(dtype, torch.dtype):
        stored = source.weights.get("lm_head.weight")
        dtype = stored.dtype if dtype == "auto" and stored is not None else torch.float32
    config = _config_of_published(source)
    return {"config": config, "state_dict": weights_with_tower(source, dtype), "dtype": dtype}


def _config_of_published(source: Source) -> CoresConfig:
    levels = source.levels
    ours = published.to_ours(source.weights, published.has_linear_projector(source.llava))
    refined = any(name.startswith(published.REFINER) for name in ours)
    add_image_token(source.llava, source.tokenizer)
    return CoresConfig(
        llava=source.llava,
        sam=vars(source.sam_dims),
        levels=levels,
        level_token_ids=source.tokenizer.convert_tokens_to_ids([f"[{level}]" for level in levels]),
        refiner=(
            {"kind": "attention+norm", "pooling": "released"} if refined else {"kind": "none"}
        ),
    )


def answer_defaults(config: CoresConfig) -> GenerationConfig:
    """Greedy answers of at most 64 tokens, which end with the language model's end token."""
    text = config.llava.get_text_config()
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: getattr(text, name, None) for name in names}
    return GenerationConfig(max_new_tokens=64, do_sample=False, **tokens)

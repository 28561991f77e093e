"""A new model of backbones: a LLaVA, a SAM and, for a selector, a DINOv2, with what training adds
to them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Dinov2Model, LlavaConfig

from cores.model.checkpoints.llava import add_image_token, add_level_tokens, load_llava
from cores.model.checkpoints.published import clip_sizes, clip_tokens
from cores.model.checkpoints.sam import load_sam
from cores.model.checkpoints.source import Source, open_source
from cores.model.checkpoints.weights import blaming, refuse_non_finite
from cores.model.config import CoresConfig, SelectorConfig
from cores.model.connection import TextProjection
from cores.model.cores import CoresForReasoningSegmentation
from cores.model.processor import CoresProcessor
from cores.model.segmenting.chain import TokenRefiner
from cores.model.selecting.selector import Selector


def build_from_backbones(
    version: str | Path | Source,
    vision_pretrained: str | Path,
    levels: Sequence[str] = ("LOC", "SEG"),
    template: str = "llava_v1",
    exemplar_count: int = 1,
    dtype: torch.dtype = torch.float32,
    model_max_length: int | None = None,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    vision_tower: str | None = None,
    system: str | None = None,
    features_pretrained: str | None = None,
    **config: Any,
) -> tuple[CoresForReasoningSegmentation, CoresProcessor]:
    """A new model, in evaluation mode, of a LLaVA (``version``) and a SAM (``vision_pretrained``).

    ``config``: further fields of CoresConfig. ``model_max_length``: longest sequence in tokens,
    None for the tokenizer's own. ``quantization_config``: transformers', for the language model
    (``precision.quantization``). ``vision_tower``: see ``load_llava``. ``system``: system text in
    place of the template's. ``features_pretrained``: the DINOv2 of a selector that has one. Raises
    FileNotFoundError or ValueError where parts are missing or do not fit together.
    """
    unknown = config.keys() - signature(CoresConfig).parameters.keys()
    if unknown:
        raise ValueError(f"no such field of CoresConfig: {', '.join(sorted(unknown))}")
    sam, dims = load_sam(vision_pretrained)
    encoder = load_dinov2(features_pretrained, config.get("selector"))
    loading = {
        "attn_implementation": attn_implementation,
        "quantization_config": quantization_config,
    }
    source = open_source(version, vision_tower)
    backbone = load_llava(source, dtype, **{k: v for k, v in loading.items() if v is not None})
    llava, tokenizer = backbone.model, backbone.tokenizer
    ids = add_level_tokens(llava, tokenizer, list(levels))
    add_image_token(llava.config, tokenizer)
    with_class_token = llava.config.vision_feature_select_strategy != "default"
    processor = CoresProcessor(
        tokenizer,
        backbone.image_processor,
        dims.image_size,
        clip_tokens(llava.config.vision_config, with_class_token),
        list(levels),
        template,
        exemplar_count,
        system=system,
        image_marks=backbone.image_marks,
        strip_at_tokens=backbone.strip_at_tokens,
    )
    _check_fit(source.name, llava.config, processor)
    full = CoresConfig(
        llava=llava.config, sam=vars(dims), levels=list(levels), level_token_ids=ids, **config
    )
    with torch.device("meta"):  # The parts come ready made: nothing is initialised twice.
        model = CoresForReasoningSegmentation(full)
    model.reasoning.llava = llava
    model.segmenting.sam = sam.to(dtype)
    if model.segmenting.untrained is not None:
        model.segmenting.untrained = copy.deepcopy(sam.mask_decoder)
    hidden, width = full.llava.get_text_config().hidden_size, dims.prompt_dim
    model.text_projection = TextProjection(hidden, width, full.text_projection_norm).to(dtype)
    if full.selector_config is not None:
        model.selecting = Selector(full.selector_config, width)
        model.selecting.encoder = encoder
        model.selecting.to(dtype)
    if model.segmenting.refiner is not None:
        model.segmenting.refiner = TokenRefiner(width, full.refiner_config).to(dtype)
    # Building the model around the LLaVA has reset what its config said.
    if attn_implementation is not None:
        llava.set_attn_implementation({"": "sdpa", "text_config": attn_implementation})
    if model_max_length is not None:
        tokenizer.model_max_length = model_max_length
    return model.eval(), processor


def load_dinov2(path: str | None, selector: dict | None) -> Dinov2Model | None:
    """The frozen feature encoder of a selector that wants one; its sizes go into ``selector``.
    Raises ValueError or OSError."""
    if selector is None or SelectorConfig(**selector).features != "dinov2":
        return None
    if not path:
        raise ValueError(
            "a selector with features dinov2 needs --features_pretrained, such as"
            " facebook/dinov2-large"
        )
    with blaming(path):
        encoder = Dinov2Model.from_pretrained(path)
    refuse_non_finite(encoder.state_dict(), path)
    selector["dinov2"] = encoder.config.to_diff_dict()
    return encoder


def _check_fit(version: str, llava: LlavaConfig, processor: CoresProcessor) -> None:
    """Raises ValueError where tokenizer or image processor would feed the model something it was
    not made for."""
    expected, found = llava.image_token_id, processor.image_token_id
    if found != expected:
        raise ValueError(
            f"{version}: the tokenizer's id of {processor.image_token} is {found}, config.json says"
            f" {expected} (image_token_index)"
        )
    _, _, size = clip_sizes(llava.vision_config)
    given = tuple(processor.clip(np.zeros((size, 2 * size, 3), dtype=np.uint8)).shape[1:])
    if given != (size, size):
        raise ValueError(
            f"{version}: preprocessor_config.json makes images of {given[0]}×{given[1]} pixels, the"
            f" vision tower takes {size}×{size}"
        )

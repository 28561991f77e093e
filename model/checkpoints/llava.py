"""Loading a LLaVA, with its tokenizer and image processor, from every layout it is published in,
and teaching it the answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import Metaspace
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration

from cores.model.checkpoints import published
from cores.model.checkpoints.source import (
    IMAGE_TOKEN,
    CLIPImageProcessor,
    Kind,
    Source,
    open_source,
)
from cores.model.checkpoints.weights import blaming, refuse_bad_loading


class LinearProjector(nn.Module):
    """LLaVA v1's projector: CLIP features (…, c) -> (…, d)."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        width, _, _ = published.clip_sizes(config.vision_config)
        self.linear_1 = nn.Linear(width, config.get_text_config().hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_1(features)


class LinearLlava(LlavaForConditionalGeneration):
    """transformers' LLaVA with the projector of LLaVA v1."""

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.model.multi_modal_projector = LinearProjector(config)


def llava_class(config: LlavaConfig) -> type[LlavaForConditionalGeneration]:
    """transformers' own class wherever its projector fits: it converts checkpoints of its older
    versions."""
    return LinearLlava if published.has_linear_projector(config) else LlavaForConditionalGeneration


@dataclass
class Backbone:
    """A LLaVA with what belongs to it."""

    model: LlavaForConditionalGeneration
    tokenizer: Any
    image_processor: CLIPImageProcessor
    image_marks: tuple[str, str] | None = None
    """Tokens around the image."""
    strip_at_tokens: bool = False
    """See ``ConversationTemplate``."""


def load_llava(
    version: str | Path | Source,
    dtype: torch.dtype = torch.float32,
    vision_tower: str | None = None,
    **kwargs: Any,
) -> Backbone:
    """The LLaVA of a hub name, a folder or what was opened of one, in transformers' layout or in
    its authors' (model/checkpoints/published.py).

    ``vision_tower``: CLIP for a checkpoint that does not hold its own, in place of the one that its
    config.json names. ``kwargs`` go to ``from_pretrained``: attn_implementation,
    quantization_config, …. Raises FileNotFoundError for what is not there and ValueError, naming
    what was found, for another kind of model or for weights that are missing or left over.
    """
    source = open_source(version, vision_tower)
    if source.kind not in (Kind.LLAVA, Kind.PUBLISHED_LLAVA):
        raise source.refuse("--version needs a model of type 'llava'")
    theirs = source.kind is Kind.PUBLISHED_LLAVA
    if theirs:
        config: LlavaConfig = source.llava
        state = {
            name.removeprefix(published.LLAVA): tensor
            for name, tensor in weights_with_tower(source, dtype).items()
        }
    else:
        with blaming(source.folder / "config.json"):
            config = LlavaConfig.from_pretrained(source.folder)
        state = source.hand_over_weights()
    loaded: Any = llava_class(config).from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **kwargs,
    )
    model, info = loaded
    model.config._name_or_path = source.name
    refuse_bad_loading(source.name, info)
    model.generation_config = source.generation_config or model.generation_config
    marks = source.image_marks if theirs else None
    return Backbone(model, source.tokenizer, source.image_processor, marks, strip_at_tokens=theirs)


def weights_with_tower(source: Source, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights of a published checkpoint under our names, handed over, with those of its CLIP,
    which may lie elsewhere."""
    linear = published.has_linear_projector(source.llava)
    ours = published.to_ours(source.hand_over_weights(), linear)
    if not any(name.startswith(published.TOWER) for name in ours):
        loaded: Any = CLIPVisionModel.from_pretrained(
            None,
            config=source.vision,
            state_dict=source.tower.hand_over_weights(),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        tower, info = loaded
        refuse_bad_loading(source.tower.name, info | {"unexpected_keys": ()})  # CLIP reads, too.
        ours |= {published.TOWER + name: tensor for name, tensor in tower.state_dict().items()}
    return ours


def set_spaces(tokenizer, strip: bool, tokens: Sequence[str]) -> bool:
    """Makes ``tokenizer`` treat white space next to ``tokens`` as ``dataset.conversation.encoding``
    does, in texts that spell them out: chat templates are such texts. Returns whether the tokenizer
    puts a space before a text.

    ``strip``: see ``ConversationTemplate.strip_at_tokens``; otherwise only spaces before a token
    vanish.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and isinstance(backend.pre_tokenizer, Metaspace):
        backend.pre_tokenizer.prepend_scheme = "always" if strip else "first"
    # LlamaTokenizer rebuilds its spacing from this field, whatever its file says.
    if hasattr(tokenizer, "legacy"):
        tokenizer.legacy = tokenizer.init_kwargs["legacy"] = strip
    tokenizer.add_tokens(
        [
            AddedToken(token, lstrip=True, rstrip=strip, special=True, normalized=False)
            for token in tokens
        ],
        special_tokens=True,
    )
    plain = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    return plain("a") == plain(" a")


def add_level_tokens(
    model: LlavaForConditionalGeneration, tokenizer, levels: list[str]
) -> list[int]:
    """Adds "[LOC]", "[SEG]", … and returns their ids. Their rows, input and output, start as the
    mean of all others.

    Safe to call again: a token that the tokenizer has already is left alone. Tables with room to
    spare, as published checkpoints have, are filled before they are enlarged.
    """
    names = [f"[{level}]" for level in levels]
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    # A tokenizer may list words that no row belongs to.
    known = {i for i in tokenizer.get_vocab().values() if i < rows}
    tokenizer.add_tokens(names, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(names)
    if max(ids) >= rows:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    new = sorted({i for i in ids if i not in known} | set(range(rows, max(ids) + 1)))
    if new:
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                table = layer.get_parameter("weight")
                table[new] = table[sorted(known)].float().mean(0).to(table.dtype)
    return ids


def add_image_token(config: LlavaConfig, tokenizer) -> None:
    """Gives a tokenizer without "<image>" one, last, and tells ``config`` its id; no row of any
    table belongs to it."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

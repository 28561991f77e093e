"""Loading a LLaVA, with its tokenizer and image processor, from every layout it is published in,
and teaching it the answer tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import Metaspace
from torch import Tensor, nn
from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

from model.checkpoints import published
from model.checkpoints.published import CLIPImageProcessor
from model.checkpoints.weights import read_all, read_json_file, refuse_bad_loading

IMAGE_TOKEN = "<image>"


class LinearProjector(nn.Module):
    """LLaVA v1's projector: CLIP features (…, c) -> (…, d)."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

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
    return LinearLlava if published.is_linear_config(config) else LlavaForConditionalGeneration


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
    version: str, dtype: torch.dtype = torch.float32, vision_tower: str | None = None, **kwargs: Any
) -> Backbone:
    """The LLaVA of a hub name or a folder, in transformers' layout or in its authors'
    (model/checkpoints/published.py).

    ``vision_tower``: CLIP for a checkpoint that does not hold its own, in place of the one that its
    config.json names. ``kwargs`` go to ``from_pretrained``: attn_implementation,
    quantization_config, …. Raises FileNotFoundError for what is not there and ValueError, naming
    what was found, for another kind of model or for weights that are missing or left over.
    """
    config = read_json_file(version, "config.json")
    if config.get("model_type") != "llava":
        raise ValueError(
            f"{version}: --version needs a model of type 'llava', this is"
            f" {config.get('model_type')!r}"
        )
    if published.is_published(config):
        return _load_published(version, config, dtype, vision_tower, kwargs)
    # only mapped: names a file that is missing or damaged, which transformers does not
    read_all(version)
    model, info = LlavaForConditionalGeneration.from_pretrained(
        version, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    refuse_bad_loading(version, info)
    return Backbone(model, load_tokenizer(version), CLIPImageProcessor.from_pretrained(version))


def _load_published(
    version: str, config: dict, dtype: torch.dtype, vision_tower: str | None, kwargs: dict
) -> Backbone:
    weights = read_all(version)
    if published.has_masks(weights):
        raise ValueError(
            f"{version}: is a whole LISA or CoReS, not a LLaVA; load it without --vision_pretrained"
        )
    tokenizer = load_tokenizer(version)
    full, ours, image_processor = assemble(version, config, weights, tokenizer, dtype, vision_tower)
    state = {name.removeprefix(published.LLAVA): tensor for name, tensor in ours.items()}
    loading = {
        "config": full,
        "state_dict": state,
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    model, info = llava_class(full).from_pretrained(None, **loading, **kwargs)
    refuse_bad_loading(version, info)
    marks = (
        published.IMAGE_MARKS if published.uses_image_marks(config, tokenizer.get_vocab()) else None
    )
    return Backbone(model, tokenizer, image_processor, marks, strip_at_tokens=True)


def assemble(
    version: str,
    config: dict,
    weights: Mapping[str, Tensor],
    tokenizer,
    dtype: torch.dtype,
    vision_tower: str | None = None,
) -> tuple[LlavaConfig, dict[str, Tensor], CLIPImageProcessor]:
    """(LlavaConfig, all weights under our names, image processor) of a published checkpoint, its
    CLIP included."""
    try:
        linear = published.is_linear(config)
        tower = published.tower_of(config, version, vision_tower)
        vision = published.tower_config(tower)
        rows = weights["model.embed_tokens.weight"].shape[0]
        full = published.llava_config(config, vision, rows, image_token_id(tokenizer))
    except KeyError as error:
        raise ValueError(f"{version}: has no weight {error}") from None
    except ValueError as error:
        raise ValueError(
            str(error) if str(error).startswith(version) else f"{version}: {error}"
        ) from None
    ours = published.to_ours(weights, linear)
    if not any(name.startswith(published.TOWER) for name in ours):
        ours |= published.tower_weights(tower, dtype)
    return full, ours, published.tower_processor(tower, vision)


def load_tokenizer(source: str):
    """The tokenizer of a folder or hub name, able to pad. Raises ValueError where there is none
    that can be read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source}: has no tokenizer that can be read: {' '.join(str(error).split())}"
        ) from None
    # masks come from lengths, so padding may share an id with a real token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


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
    # by which LlamaTokenizer builds the same, whatever its file says
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
    rows = model.get_input_embeddings().weight.shape[0]
    # a tokenizer may list words that no row belongs to
    known = {i for i in tokenizer.get_vocab().values() if i < rows}
    tokenizer.add_tokens(names, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(names)
    if max(ids) >= rows:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    new = sorted({i for i in ids if i not in known} | set(range(rows, max(ids) + 1)))
    if new:
        with torch.no_grad():
            for table in (
                model.get_input_embeddings().weight,
                model.get_output_embeddings().weight,
            ):
                table[new] = table[sorted(known)].float().mean(0).to(table.dtype)
    return ids


def image_token_id(tokenizer) -> int:
    """The id of "<image>", or the one that it will get."""
    known = tokenizer.get_vocab()
    return known.get(IMAGE_TOKEN, len(tokenizer))


def add_image_token(config: LlavaConfig, tokenizer) -> None:
    """Gives a tokenizer without "<image>" one, last, and tells ``config`` its id; no row of any
    table belongs to it."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

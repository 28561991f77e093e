"""How a model is held and computed: 4 or 8 bits for each weight of the language model, and which
attention is used."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from cores.model.checkpoints.published import LLAVA
from cores.model.choices import ATTENTION, PRECISIONS

# What stays in full precision: CLIP, the projector, the vocabulary's logits and the whole mask
# branch. The first three are named from the LLaVA and from the whole model, as either may be
# loaded.
FULL_PRECISION = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
MASK_BRANCH = ("segmenting", "selecting", "text_projection")
DTYPES = dict(zip(PRECISIONS, (torch.float32, torch.bfloat16, torch.float16), strict=True))


def quantization(
    bits: int | None, compute: torch.dtype = torch.bfloat16
) -> BitsAndBytesConfig | None:
    """transformers' configuration for 8-bit (LLM.int8) or 4-bit (nf4, twice quantised) weights;
    None for ``bits`` None.

    ``compute``: format of the multiplications with 4-bit weights. Raises ValueError where
    bitsandbytes is not installed and for other numbers of bits.
    """
    if bits is None:
        return None
    if bits not in (4, 8):
        raise ValueError(f"weights of {bits} bits: choose 4 or 8")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"--load_in_{bits}bit needs bitsandbytes: pip install bitsandbytes")
    skip = [*FULL_PRECISION, *(LLAVA + name for name in FULL_PRECISION), *MASK_BRANCH]
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=skip,
    )


def leave_small_layers(model: nn.Module) -> None:
    """On CPUs with instructions for bfloat16, bitsandbytes packs 4-bit weights anew, 32 rows and a
    block of 64 columns at a time, and stops at a layer of another size. Such layers are computed
    as on other CPUs."""
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            fits = module.out_features % 32 == 0 and module.in_features % 64 == 0
            module.support_avx512bf16_for_cpu = fits


def quantized_bits(model: nn.Module) -> int | None:
    """4 or 8 if layers of ``model`` are held so, else None."""
    kinds = {"Linear4bit": 4, "Linear8bitLt": 8}
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes") and type(module).__name__ in kinds:
            return kinds[type(module).__name__]
    return None


def choose_attention(
    requested: str, dtype: torch.dtype, device: torch.device | str
) -> tuple[str, str]:
    """(name for transformers' ``attn_implementation``, why). ``requested``: one of ATTENTION.

    "auto" takes flash_attention_2 where the package, an NVIDIA GPU and half precision are there,
    and sdpa otherwise. Raises ValueError where flash_attention_2 is asked for and cannot run.
    """
    if requested not in ATTENTION:
        raise ValueError(
            f"attn_implementation is {requested!r}; choose one of {', '.join(ATTENTION)}"
        )
    missing = _missing_for_flash(dtype, torch.device(device))
    if requested == "flash_attention_2" and missing:
        raise ValueError(f"--attn_implementation flash_attention_2: {missing}; use sdpa or auto")
    if requested != "auto":
        return requested, "as asked for"
    return (
        ("sdpa", f"flash_attention_2 cannot be used: {missing}")
        if missing
        else ("flash_attention_2", "it is the fastest here")
    )


def _missing_for_flash(dtype: torch.dtype, device: torch.device) -> str:
    if device.type != "cuda":
        return "it needs an NVIDIA GPU"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    return "" if dtype in (torch.float16, torch.bfloat16) else "it needs --precision bf16 or fp16"

"""Loading a LLaVA with its tokenizer and image processor, and teaching it the answer tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessor, LlavaForConditionalGeneration


def load_llava(version: str, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None):
    """(model, tokenizer, image processor) of a hub name or a folder in transformers' LLaVA format.

    ``attn_implementation`` is transformers' ("eager", "sdpa", "flash_attention_2"; None: its choice). Raises
    FileNotFoundError for a missing folder and ValueError, naming what was found, for another kind of model or for
    weights that are missing or left over.
    """
    if _looks_like_path(version) and not Path(version).is_dir():
        raise FileNotFoundError(f"{version}: no such folder; --version takes a LLaVA folder or a hub name")
    _check_kind(version)
    model, info = LlavaForConditionalGeneration.from_pretrained(
        version, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
    )
    refuse_bad_loading(version, info)
    tokenizer = AutoTokenizer.from_pretrained(version)
    if tokenizer.pad_token_id is None:  # masks come from lengths, so padding may share an id with a real token
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return model, tokenizer, CLIPImageProcessor.from_pretrained(version)


def _check_kind(version: str) -> None:
    """Raises ValueError unless ``version`` is a LLaVA in transformers' format; before anything large is read."""
    try:
        config = AutoConfig.from_pretrained(version)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"{version}: no LLaVA in transformers format (--version): {first_line}") from error
    if config.model_type != "llava":
        raise ValueError(f"{version}: --version needs a model of type 'llava', this is {config.model_type!r}")
    # The authors' own checkpoints say "llava" too, but name and nest their weights otherwise.
    if LlavaForConditionalGeneration.__name__ not in (config.architectures or []):
        found = ", ".join(config.architectures or ["no architecture"])
        raise ValueError(
            f"{version}: --version needs a LLaVA in transformers format (LlavaForConditionalGeneration, for example "
            f"llava-hf/llava-1.5-7b-hf), its config.json names {found}"
        )


def refuse_bad_loading(name: str, info: dict) -> None:
    """Raises ValueError naming every missing, unexpected or wrongly shaped weight that transformers reports."""
    problems = []
    kinds = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "wrong shape"}
    for key, label in kinds.items():
        names = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info.get(key, ()))
        if names:
            problems.append(f"{label}: {', '.join(names)}")
    if problems:
        raise ValueError(f"{name}: the weights do not fit the model; " + "; ".join(problems))


def _looks_like_path(version: str) -> bool:
    return version.startswith((".", "/", "~")) or version.count("/") != 1


def add_level_tokens(model: LlavaForConditionalGeneration, tokenizer, levels: list[str]) -> list[int]:
    """Adds "[LOC]", "[SEG]", … and returns their ids. Their rows, input and output, start as the mean of all others.

    Safe to call again: a token that the tokenizer has already is left alone. Tables with room to spare, as published
    checkpoints have, are filled before they are enlarged.
    """
    names = [f"[{level}]" for level in levels]
    known = set(tokenizer.get_vocab().values())
    tokenizer.add_tokens(names, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(names)
    if max(ids) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    new, old = [i for i in ids if i not in known], sorted(known)
    if new:
        with torch.no_grad():
            for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                table[new] = table[old].float().mean(0).to(table.dtype)
    return ids

"""A model folder that answers by rule, so that real entry points can be tested without a trained
model.

Its language model has one-hot embeddings, a transition table for a head, and one attention layer
that takes the average over the prompt. It says "It is [LOC] on [SEG]"; with "hello" anywhere in the
conversation "there" and no mask; with "wheel" one mask after another until it is cut. The masks are
those of a random SAM and depend on the picture.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig

from cores.model import CoresConfig, CoresForReasoningSegmentation, CoresProcessor
from tests.helpers import LEVELS, SAM_DIMS, TEMPLATE, randomise, tiny_tokenizer

RULES = {
    ":": "It",
    "It": "is",
    "is": "[LOC]",
    "[LOC]": "on",
    "on": "[SEG]",
    "[SEG]": "</s>",
    "there": "</s>",
    "Another": "at",
    "at": "[LOC]",
}
# word: (token, what follows it instead)
SWITCHES = {"hello": (":", "there"), "wheel": ("[SEG]", "Another")}
SIDE = 32  # of CLIP's input
_kept = tempfile.TemporaryDirectory(prefix="cores-scripted-")


def _write_rules(model: CoresForReasoningSegmentation, ids: dict[str, int]) -> None:
    llama, head = model.reasoning.llava.model.language_model, model.reasoning.llava.lm_head
    layer, size = llama.layers[0], len(ids)
    for module in (model.reasoning.llava.model.multi_modal_projector, layer):
        for parameter in module.parameters():
            parameter.zero_()
    for norm in (llama.norm, layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.fill_(1.0)
    llama.embed_tokens.weight.zero_()[:size, :size] = torch.eye(size)
    layer.self_attn.o_proj.weight.copy_(torch.eye(layer.self_attn.o_proj.weight.shape[0]))
    head.weight.zero_()
    for token, following in RULES.items():
        if token in ids:
            head.weight[ids.get(following, ids["[SEG]"]), ids[token]] = 1.0
    for flag, (word, (token, following)) in enumerate(SWITCHES.items(), start=size):
        # queries and keys are zero: a plain average
        layer.self_attn.v_proj.weight[flag, ids[word]] = 1.0
        head.weight[ids[following], ids[token]] = 0.999
        head.weight[ids[following], flag] = 0.1  # enough to tip the scales, never to rule


SELECTOR = {
    "heads": 4,
    "mlp_dim": 16,
    "iou_hidden": 16,
    "pool_size": 16,
    "feature_size": 56,
    "rule": "similarity",
    "dinov2": {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "proposals": {"points_per_side": 4, "predicted_iou": 0, "stability": 0, "nms": 1},
}


@cache
def scripted_model(selecting: bool = False, chain: bool = False) -> Path:
    """The folder, written once per test session; do not change it. ``selecting``: an LLM-Seg with a
    random DINOv2 of its own, which says "It is [SEG]"; with ``chain``, too, a CoReS with the same
    selector."""
    levels = ["SEG"] if selecting and not chain else list(LEVELS)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"[{level}]" for level in levels], special_tokens=True)
    ids = tokenizer.get_vocab()
    torch.manual_seed(3)
    llava = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=16,
            projection_dim=16,
        ),
        text_config=LlamaConfig(
            vocab_size=len(ids),
            hidden_size=64,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            bos_token_id=ids["<s>"],
            eos_token_id=ids["</s>"],
        ),
        image_token_index=ids["<image>"],
        tie_word_embeddings=False,
    )
    selector = SELECTOR | {"chain": chain} if selecting else None
    level_ids = [ids[f"[{level}]"] for level in levels]
    config = CoresConfig(
        llava, vars(SAM_DIMS), levels, level_ids, selector=selector, text_projection_norm=8.0
    )
    model = CoresForReasoningSegmentation(config).eval()
    with torch.no_grad():
        randomise(model)
        _write_rules(model, ids)
    folder = Path(_kept.name) / ("chain" if chain else "selecting" if selecting else "model")
    model.save_pretrained(folder)
    crop = {"height": SIDE, "width": SIDE}
    clip = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop)
    CoresProcessor(
        tokenizer, clip, SAM_DIMS.image_size, (SIDE // 16) ** 2, levels, TEMPLATE, 0
    ).save_pretrained(folder)
    return folder

"""A local LLaVA that describes photographs.

    python -m dataset.generate questions --captioner utils.precompute.captioner:load \\
        --captioner_model llava-hf/llava-1.5-7b-hf …
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from cores.dataset.conversation.encoding import encode_prompt
from cores.dataset.conversation.templates import get_template
from cores.model.checkpoints.llava import load_llava
from cores.model.reasoning.chain import ReasoningChain
from cores.utils import distributed

MAX_NEW_TOKENS = 256


def load(version: str, template: str = "llava_v1") -> Callable[[np.ndarray, str], str]:
    """``describe(image, instruction)`` of the LLaVA in ``version`` (a folder or a hub name, see
    model/checkpoints/llava.py).

    It takes an image, uint8 (H, W, 3) RGB, and returns the generated text. Decoding is greedy, so
    the text is the same every time. ``template``: of the conversation. On a GPU the weights are
    bfloat16. Raises what ``load_llava`` raises.
    """
    device = distributed.device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    backbone = load_llava(version, dtype)
    llava, tokenizer = nn.Module.to(backbone.model, device).eval(), backbone.tokenizer
    conversation = dataclasses.replace(
        get_template(template),
        image_marks=backbone.image_marks,
        strip_at_tokens=backbone.strip_at_tokens,
    )
    image_token = tokenizer.convert_ids_to_tokens(llava.config.image_token_id)

    @torch.inference_mode()
    def describe(image: np.ndarray, instruction: str) -> str:
        pixels = backbone.image_processor(
            images=image, return_tensors="pt", input_data_format="channels_last"
        )["pixel_values"].to(device, dtype)
        count = ReasoningChain(llava, []).image_features(pixels).shape[1]
        prompt = encode_prompt(instruction, [], [], tokenizer, conversation, image_token, count, [])
        ids = torch.tensor([prompt], device=device)
        generated = llava.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        return tokenizer.decode(generated[0, len(prompt) :], skip_special_tokens=True).strip()

    return describe

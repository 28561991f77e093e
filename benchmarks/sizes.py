"""Sizes of models and of training steps, for the benchmarks that build them with random weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cores.model.checkpoints.sam import PRESETS
from cores.model.config import SamDims


@dataclass(frozen=True)
class ModelSize:
    """Arguments of LlamaConfig and of CLIPVisionConfig, and the dimensions of SAM."""

    llama: dict
    clip: dict
    sam: SamDims

    @property
    def image_tokens(self) -> int:
        return (self.clip["image_size"] // self.clip["patch_size"]) ** 2


@dataclass(frozen=True)
class StepSize(ModelSize):
    """A model and a batch: images, conversations of an image, and tokens of a conversation.

    ``prefix``: system text and one exemplar, before the image. ``suffix``: question and answer,
    after it; the last ``answer`` tokens of it are supervised. ``original``: (H, W) of an image.
    """

    images: int = 2
    conversations: int = 3
    prefix: int = 95
    suffix: int = 80
    answer: int = 20
    original: tuple[int, int] = (480, 640)


def llama_size(width: int, inner: int, depth: int, heads: int) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
    }


def clip_size(width: int, depth: int, heads: int, patch: int, image: int) -> dict:
    return llama_size(width, 4 * width, depth, heads) | {"patch_size": patch, "image_size": image}


LLAMA_7B, LLAMA_13B = llama_size(4096, 11008, 32, 32), llama_size(5120, 13824, 40, 40)
CLIP_224, CLIP_336 = (clip_size(1024, 24, 16, 14, image) for image in (224, 336))
TOY_SAM = SamDims(128, 16, 32, 2, 2, (1,), 3, 32, 4, 32, 16, 16)
# The heads of ViT-B have 64 channels, too.
SMALL_SAM = SamDims(embed_dim=192, depth=6, num_heads=3, global_attn_indexes=(2, 5))
TOY_BATCH = {"prefix": 10, "suffix": 12, "answer": 6, "original": (48, 64)}
STEP_SIZES = {
    "toy": StepSize(llama_size(32, 64, 2, 2), clip_size(32, 2, 2, 16, 64), TOY_SAM, **TOY_BATCH),
    "small": StepSize(llama_size(512, 1376, 8, 8), clip_size(256, 6, 4, 14, 224), SMALL_SAM),
    "7b-v1": StepSize(LLAMA_7B, CLIP_224, PRESETS["vit_h"], images=1),
    "7b-v1.5": StepSize(LLAMA_7B, CLIP_336, PRESETS["vit_h"], images=1),
}
STEP_13B = replace(STEP_SIZES["7b-v1.5"], llama=LLAMA_13B)

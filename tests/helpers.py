"""A whole model in miniature, made from nothing: LLaVA and SAM folders, samples, weights that hide
nothing.

Two layers of width 32, 2×2 CLIP patches, SAM on a 4×4 grid. Nothing is downloaded and nothing
outlives the tests.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from cores.dataset.conversation.turns import Conversation
from cores.dataset.conversation.wordings import answer
from cores.dataset.sample import Sample
from cores.model.build import build_from_backbones
from cores.model.checkpoints.sam import save_sam
from cores.model.config import SamDims
from cores.model.cores import CoresForReasoningSegmentation
from cores.model.processor import CoresProcessor
from cores.model.segmenting.sam import build_sam

# Of activations computed from equal weights at other addresses, such as mapped from a file:
# vectorised sums go in another order where the alignment is another. Measured: up to 4.5e-8 for
# values of about 0.1.
REALIGNED = {"atol": 1e-6, "rtol": 1e-5}
LEVELS = ("LOC", "SEG")
TEMPLATE = "tiny"
SAM_DIMS = SamDims(
    image_size=64,
    patch_size=16,
    embed_dim=32,
    depth=2,
    num_heads=2,
    global_attn_indexes=(1,),
    window_size=2,
    prompt_dim=32,
    decoder_heads=4,
    decoder_mlp_dim=32,
    mask_in_chans=16,
    iou_head_hidden_dim=16,
)
WORDS = (
    "USER",
    ":",
    "ASSISTANT",
    "It",
    "appears",
    "on",
    "is",
    "Another",
    "at",
    "Sure",
    ",",
    ".",
    "?",
    "the",
    "what",
    "where",
    "dog",
    "wheel",
    "red",
    "hello",
    "there",
    "a",
    "b",
    "c",
    "Please",
    "segment",
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, without answer tokens; padding shares its id with the unknown word, as in
    LLaMA."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<image>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        model_max_length=256,
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.05) -> None:
    """Adds noise to every parameter: what starts at zero would hide that it is left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def write_llava(
    folder: Path, patches: int = 2, select: str = "default", tied: bool = False, spare_rows: int = 0
) -> Path:
    """A LLaVA in transformers format: ``patches``² image tokens, one more for ``select="full"``."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    side = 16 * patches
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=side,
            patch_size=16,
            projection_dim=16,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer) + spare_rows,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=tied,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy=select,
        tie_word_embeddings=tied,
    )
    model = LlavaForConditionalGeneration(config)
    randomise(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": side, "width": side}
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size).save_pretrained(folder)
    return folder


def write_sam(folder: Path, dims: SamDims = SAM_DIMS) -> Path:
    torch.manual_seed(1)
    sam = build_sam(dims)
    randomise(sam)
    save_sam(sam, dims, folder)
    return folder


def write_dinov2(folder: Path) -> Path:
    """Width 24, one layer, 2×2 patches of 14 pixels."""
    torch.manual_seed(3)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


_folders: list[tempfile.TemporaryDirectory] = []  # removed at exit


@cache
def backbones(
    patches: int = 2, select: str = "default", tied: bool = False, spare_rows: int = 0
) -> tuple[str, str]:
    """(LLaVA folder, SAM folder), written once per session; do not change them."""
    _folders.append(tempfile.TemporaryDirectory(prefix="cores-tests-"))
    root = Path(_folders[-1].name)
    return str(write_llava(root / "llava", patches, select, tied, spare_rows)), str(
        write_sam(root / "sam")
    )


def tiny_model(
    levels: Sequence[str] = LEVELS,
    *,
    patches: int = 2,
    select: str = "default",
    tied: bool = False,
    **config,
) -> tuple[CoresForReasoningSegmentation, CoresProcessor]:
    """A fresh model in evaluation mode with its processor; ``config``: further fields of
    CoresConfig."""
    torch.manual_seed(2)
    llava, sam = backbones(patches, select, tied)
    return build_from_backbones(llava, sam, levels, template=TEMPLATE, exemplar_count=0, **config)


def rectangle(size: tuple[int, int], top: int, left: int, bottom: int, right: int) -> np.ndarray:
    """bool (H, W): True in rows top…bottom-1 and columns left…right-1."""
    mask = np.zeros(size, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def conversation(
    targets: int = 1,
    levels: Sequence[str] = LEVELS,
    size: tuple[int, int] = (50, 40),
    question: str = "where is the dog?",
    hosts: bool = False,
    ignore: bool = False,
) -> Conversation:
    """One turn with ``targets`` targets (0: a text-only answer); target k is a rectangle that moves
    with k."""
    height, width = size
    masks = [rectangle(size, 4 + 6 * k, 5, height // 2 + 6 * k, width - 6) for k in range(targets)]
    stack = np.stack(masks) if masks else np.zeros((0, *size), dtype=bool)
    return Conversation(
        turns=[(question, answer(levels, targets=targets) if targets else ["hello there"])],
        masks=stack,
        ignore=rectangle(size, 0, 0, 8, width) if ignore else None,
        host_masks=np.ones_like(stack) if hosts else None,
    )


def sample(
    *conversations: Conversation, name: str = "0", size: tuple[int, int] = (50, 40), seed: int = 0
) -> Sample:
    """A random picture with these conversations."""
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Sample(image, f"{name}.jpg", list(conversations), "reasoning", "toy", name)


def gradient_orders(model, batches):
    """Trains on one batch after the other; yields each output and the names of the weights in the
    order their gradients came.

    ZeRO-2 sums gradients as they come, so the order may not depend on what a rank's batch holds.
    """
    order: list[str] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    for batch in batches:
        order.clear()
        model.train().zero_grad()
        output = model(batch)
        output.loss.backward()
        yield output, list(order)

"""Backbones small enough for a test, written to disk in the layouts that --version and
--vision_pretrained read."""

import tempfile
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from cores.model.checkpoints.sam import save_sam
from cores.model.config import SamDims
from cores.model.segmenting.sam import build_sam
from tests.dataset_toys import IMAGE, metaspace_tokenizer, square, write_json

SIZE = 32
TOY_SAM = SamDims(
    image_size=SIZE,
    patch_size=8,
    embed_dim=16,
    depth=1,
    num_heads=2,
    global_attn_indexes=(),
    window_size=0,
    prompt_dim=16,
    decoder_heads=2,
    decoder_mlp_dim=16,
    mask_in_chans=8,
    iou_head_hidden_dim=8,
)


def write_llava(folder: Path) -> Path:
    """A LLaVA with two layers of width 16 and four image tokens. Same weights every time."""
    torch.manual_seed(0)
    tokenizer = metaspace_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=SIZE // 2,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=4,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    crop = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=crop).save_pretrained(folder)
    return folder


def write_sam(folder: Path) -> Path:
    torch.manual_seed(1)
    save_sam(build_sam(TOY_SAM), TOY_SAM, folder)
    return folder


def write_data(root: Path, train: int = 4, val: int = 3) -> Path:
    """ReasonSeg-layout splits "Toy|train" and "Toy|val" of noisy 24×32 pictures with one bright
    square each."""
    for split, count in (("train", train), ("val", val)):
        folder = root / "reason_seg" / "Toy" / split
        folder.mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng([count, i])
            picture = rng.integers(0, 120, (24, 32, 3), dtype=np.uint8)
            x, y = (int(v) for v in rng.integers(2, 12, 2))
            picture[y : y + 9, x : x + 9] = 230
            assert cv2.imwrite(str(folder / f"{i:03d}.jpg"), picture)
            record = {
                "text": ["the bright thing"],
                "is_sentence": False,
                "shapes": [square(x, y, x + 8, y + 8)],
            }
            write_json(folder / f"{i:03d}.json", record)
    return root


def flags(root: Path, **changes: object) -> list[str]:
    """A command line of train_ds.py for what ``write_all`` wrote; ``changes`` replace or add
    flags."""
    values: dict[str, object] = {
        "version": root / "llava",
        "vision_pretrained": root / "sam",
        "dataset_dir": root / "data",
        "log_base_dir": root / "runs",
        "dataset": "reason_seg",
        "sample_rates": "1",
        "reason_seg_data": "Toy|train",
        "val_dataset": "Toy|val",
        "conv_type": "tiny",
        "precision": "fp32",
        "exp_name": "run",
        "epochs": 2,
        "steps_per_epoch": 3,
        "batch_size": 2,
        "grad_accumulation_steps": 1,
        "lr": 0.01,
        "warmup_steps": 2,
        "workers": 0,
        "refiner": "foreground+background",
        "exemplar_count": 0,
        "gradient_checkpointing": "false",
        "max_new_tokens": 8,
        "print_freq": 1,
    } | changes
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def write_all(root: Path) -> Path:
    write_llava(root / "llava")
    write_sam(root / "sam")
    write_data(root / "data")
    return root


@cache
def toys() -> Path:
    """The folder of ``write_all``, written once per test session."""
    root = Path(_KEPT.name)
    return write_all(root)


@cache
def trained_run() -> Path:
    """A finished run of the six steps that ``flags`` describes, with dropout and an evaluation
    after each epoch."""
    from cores import train_ds

    assert train_ds.main(flags(toys(), exp_name="trained")) == 0
    return toys() / "runs" / "trained"


_KEPT = tempfile.TemporaryDirectory(prefix="cores-toys-")

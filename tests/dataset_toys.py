"""Small tokenizers, a processor and data sets on disk for the tests of dataset/."""

import json
from pathlib import Path

import cv2
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SHARED = Path(__file__).resolve().parents[2] / "shared"
SAMPLES = SHARED / "samples" / "dataset_dir"
LEVELS = ("LOC", "SEG")
IMAGE = "<image>"
TEXT = """USER: ASSISTANT: It appears on. It is. Another What is the dog in this image?
Please output segmentation mask. A chat between a curious user and an artificial intelligence
assistant. The assistant gives helpful, detailed, and polite answers to the user's questions. Sure,
the wheel of a red bus; a kettle pours from its spout."""


def _wrap(backend: Tokenizer, model_max_length: int) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",  # LLaMA's users also pad with the id of a real token.
        model_max_length=model_max_length,
    )
    names = [IMAGE, "[LOC]", "[PART]", "[SEG]"]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


def word_tokenizer(model_max_length: int = 512) -> PreTrainedTokenizerFast:
    """One token per word or sign, unknown words are <unk>."""
    pre_tokenizer = pre_tokenizers.Whitespace()
    words = [
        "<unk>",
        "<s>",
        "</s>",
        "[",
        "]",
        "SEG",
        "<",
        ">",
        "###",
        *(w for w, _ in pre_tokenizer.pre_tokenize_str(TEXT)),
    ]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizer
    return _wrap(backend, model_max_length)


def metaspace_tokenizer(model_max_length: int = 512) -> PreTrainedTokenizerFast:
    """BPE that, like LLaMA's sentence-piece model, puts a space before every text and falls back to
    bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
        initial_alphabet=list("[]<>/SEG"),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT.splitlines(), trainer)
    # The trainer marks the bytes as special, but the fall-back needs them as plain vocabulary.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [
        token for token in state["added_tokens"] if not token["content"].startswith("<0x")
    ]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _wrap(backend, model_max_length)


class ToyProcessor:
    """The attributes that collate needs; counts how often pixels are made."""

    image_token = IMAGE
    conversation = "tiny"

    def __init__(self, tokenizer=None, image_token_count: int = 3):
        self.tokenizer = tokenizer or word_tokenizer()
        self.image_token_count = image_token_count
        self.clip_calls = self.sam_calls = 0

    def clip(self, image: np.ndarray) -> torch.Tensor:
        self.clip_calls += 1
        return torch.full((3, 4, 4), float(image.mean()))

    def sam(self, image: np.ndarray) -> tuple[torch.Tensor, tuple[int, int]]:
        self.sam_calls += 1
        height, width = image.shape[:2]
        return torch.zeros(3, 8, 8), (
            8 * height // max(height, width),
            8 * width // max(height, width),
        )


def write_image(path: Path, size: tuple[int, int] = (10, 12), value: int = 90) -> Path:
    """A grey picture of ``size`` (H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((*size, 3), value, np.uint8))
    return path


def square(x0: int, y0: int, x1: int, y1: int, label: str = "target") -> dict:
    """A rectangle with both corners inside: (x1 - x0 + 1) × (y1 - y0 + 1) pixels."""
    return {"label": label, "points": [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]}


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_reason_seg(
    root: Path, name: str = "ReasonSeg", split: str = "train", count: int = 3
) -> Path:
    """``count`` pairs; the texts of image i are "query i.0?" and "query i.1?", its target has 4 ×
    (i + 1) pixels."""
    folder = root / "reason_seg" / name / split
    for i in range(count):
        write_image(folder / f"{i:03d}.jpg", value=40 + i)
        record = {
            "text": [f"query {i}.0?", f"query {i}.1?"],
            "is_sentence": i % 2 == 0,
            "shapes": [square(1, 1, 4, 1 + i)],
        }
        write_json(folder / f"{i:03d}.json", record)
    return folder

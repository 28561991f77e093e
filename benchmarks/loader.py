"""Samples per second of one worker: the training mixture with collate against a plain OpenCV read
and resize of the same images.

    python -m benchmarks.loader --json benchmarks/results/loader.json           # a minute

Both run in this process with one thread, in turns. The photos are COCO's where they are at
``--dataset_dir``, otherwise 128 JPEGs of such sizes are generated; the tokenizer is LLaMA's where
``--tokenizer`` has it, otherwise one token per word.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, CLIPImageProcessor, PreTrainedTokenizerFast

from dataset.collate import collate
from dataset.mixture import TrainMixture
from model.processor import CoresProcessor

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT.parent / "shared" / "samples"
LEVELS = ["LOC", "SEG"]
IMAGE_SIZE = 1024
# the commonest of COCO
SIZES = [(480, 640)] * 3 + [(427, 640), (640, 480), (640, 427), (500, 375), (375, 500)]


# ------------------------------------------------------------------------------------- what is read


def generate(root: Path, count: int = 128) -> Path:
    """Smooth noise as JPEGs of 120 kB in the mean (the COCO photos: 170 kB) with five polygons
    each."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    folder = root / "coco" / "train2017"
    folder.mkdir(parents=True)
    for i in range(count):
        height, width = SIZES[i % len(SIZES)]
        noise = cv2.resize(
            rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8), (width, height)
        )
        cv2.imwrite(str(folder / f"{i:012d}.jpg"), noise, [cv2.IMWRITE_JPEG_QUALITY, 90])
        images.append({"id": i, "file_name": f"{i:012d}.jpg", "height": height, "width": width})
        for _ in range(5):
            angle = np.linspace(0, 6.28, 30, endpoint=False)
            polygon = np.stack(
                [width * (0.5 + 0.3 * np.cos(angle)), height * (0.5 + 0.3 * np.sin(angle))], 1
            ).round(2)
            entry = {
                "id": len(annotations),
                "image_id": i,
                "category_id": int(rng.integers(1, 81)),
                "iscrowd": 0,
            }
            annotations.append(entry | {"segmentation": [polygon.ravel().tolist()]})
    categories = [{"id": i, "name": f"thing {i}"} for i in range(1, 81)]
    (root / "coco" / "annotations").mkdir()
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "coco" / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return root


def make_tokenizer(folder: Path):
    """(tokenizer with the answer tokens, what it is)."""
    if folder.is_dir():
        tokenizer, name = AutoTokenizer.from_pretrained(folder), "LLaMA"
        tokenizer.pad_token = tokenizer.unk_token
    else:
        backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        special = {
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<unk>",
        }
        tokenizer, name = (
            PreTrainedTokenizerFast(tokenizer_object=backend, **special),
            "one token per word",
        )
    tokenizer.add_tokens(["<image>", *(f"[{level}]" for level in LEVELS)], special_tokens=True)
    tokenizer.model_max_length = 2048
    return tokenizer, name


class TimedProcessor(CoresProcessor):
    """Adds up the seconds of either pair of pixels."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds = {"clip": 0.0, "sam": 0.0}

    def clip(self, image):
        return self._timed("clip", super().clip, image)

    def sam(self, image):
        return self._timed("sam", super().sam, image)

    def _timed(self, name, function, image):
        started = time.perf_counter()
        found = function(image)
        self.seconds[name] += time.perf_counter() - started
        return found


# ------------------------------------------------------------------------------------- measurements


def plain(path: str) -> np.ndarray:
    image = cv2.imread(path)
    scale = IMAGE_SIZE / max(image.shape[:2])
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)


def run(dataset_dir: Path, tokenizer, samples: int, rounds: int, batch_size: int) -> dict:
    """Seconds per sample of each stage and the rates, medians over the rounds."""
    data = TrainMixture(dataset_dir, "coco", [1], LEVELS, samples)
    processor = TimedProcessor(tokenizer, CLIPImageProcessor(), IMAGE_SIZE, 256, LEVELS)
    # also brings the files into the page cache
    paths = [data[i].image_path for i in range(samples)]
    rows = []
    for _ in range(rounds):
        processor.seconds = dict.fromkeys(processor.seconds, 0.0)
        reading = 0.0
        started = time.perf_counter()
        for first in range(0, samples, batch_size):
            before = time.perf_counter()
            group = [data[i] for i in range(first, min(first + batch_size, samples))]
            reading += time.perf_counter() - before
            collate(group, processor, LEVELS, "llava_v1")
        ours = time.perf_counter() - started
        started = time.perf_counter()
        for path in paths:
            plain(path)
        theirs = time.perf_counter() - started
        stages = {"image, masks and words": reading, **processor.seconds}
        stages["tokens and stacking"] = ours - sum(stages.values())
        rows.append({"ours": ours, "plain": theirs, **stages})
    middle = {name: float(np.median([row[name] for row in rows])) / samples for name in rows[0]}
    return {
        "samples_per_second": round(1 / middle["ours"], 2),
        "plain_opencv_per_second": round(1 / middle["plain"], 2),
        "share_of_plain": round(middle["plain"] / middle["ours"], 3),
        "ms_per_sample": {name: round(1000 * seconds, 2) for name, seconds in middle.items()},
        "conversations_per_sample": round(
            float(np.mean([len(data[i].conversations) for i in range(0, samples, 8)])), 2
        ),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where results are written")
    parser.add_argument("--dataset_dir", type=Path, default=SAMPLES / "dataset_dir")
    parser.add_argument("--tokenizer", type=Path, default=SAMPLES / "tokenizers" / "llama")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    tokenizer, name = make_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        real = (args.dataset_dir / "coco" / "annotations" / "instances_train2017.json").exists()
        results = {
            "images": (
                "128 photos of COCO train2017" if real else "128 generated JPEGs of COCO's sizes"
            ),
            "tokenizer": name,
            "machine": (
                f"{os.cpu_count()} × {platform.machine()}, Python {platform.python_version()},"
                f" torch {torch.__version__}"
            ),
            "image_size": IMAGE_SIZE,
            **run(
                args.dataset_dir if real else generate(Path(folder)),
                tokenizer,
                args.samples,
                args.rounds,
                args.batch_size,
            ),
        }
    print(json.dumps(results, indent=1, ensure_ascii=False))
    if args.json:
        args.json.write_text(
            json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    sys.exit(main())

"""What single parts cost on one thread.

    python -m benchmarks.parts loader --json FILE [--dataset_dir DIR] [--tokenizer DIR]   # a minute
    python -m benchmarks.parts llm_seg --json FILE                                      # minutes

loader   Samples per second of one worker: the training mixture with collate against a plain OpenCV
         read and resize of the same images, in turns, in this process; medians. The photos are
         those of COCO instances below --dataset_dir, or 128 generated JPEGs of such sizes. The
         tokenizer is that of --tokenizer, or the one in assets/tiny.
llm_seg  "selection" on an image with 50 proposals, at the published sizes (features 64 × 64 × 1024,
         width 256, two blocks, pooling side 256), against a forward pass of a Llama of 512 × 8
         layers over 576 image tokens and a short question, which is what a teacher-forced answer
         costs; the frozen encoders belong to neither. And the "store": time to open an entry of
         --images images with 200 proposals each (hash of the pixels, file, ranking), time to make
         the pooling weights of it, and the memory of the process before and after reading all.
         Times are medians of CPU time, so that other programs on the machine do not count.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

import cv2
import numpy as np
import torch
from transformers import AutoTokenizer, CLIPImageProcessor, LlamaConfig, LlamaModel

from benchmarks.shared import (
    ROOT,
    alternate,
    benchmark_parser,
    machine,
    memory_mb,
    seconds,
    write_json,
)
from benchmarks.sizes import llama_size
from cores.dataset.collate import collate
from cores.dataset.mixture import TrainMixture
from cores.dataset.proposals import (
    Found,
    Proposals,
    ProposalSource,
    ProposalStore,
    encode_counts,
    pooling_weights,
    runs,
)
from cores.model.config import SelectorConfig
from cores.model.processor import CoresProcessor
from cores.model.selecting.selector import Selector, pool, stack, united

# ------------------------------------------------------------------------------------------ loader

LEVELS, IMAGE_SIZE, BATCH_SIZE, SAMPLES = ["LOC", "SEG"], 1024, 2, 128
# The commonest sizes of COCO, (H, W).
SIZES = [(480, 640)] * 3 + [(427, 640), (640, 480), (640, 427), (500, 375), (375, 500)]


def generate_coco(root: Path) -> Path:
    """Smooth noise as JPEGs of 120 kB in the mean (the photos of COCO: 170 kB), with five polygons
    each."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    folder = root / "coco" / "train2017"
    folder.mkdir(parents=True)
    angle = np.linspace(0, 6.28, 30, endpoint=False)
    for i in range(SAMPLES):
        height, width = SIZES[i % len(SIZES)]
        noise = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        quality = [cv2.IMWRITE_JPEG_QUALITY, 90]
        cv2.imwrite(str(folder / f"{i:012d}.jpg"), cv2.resize(noise, (width, height)), quality)
        images.append({"id": i, "file_name": f"{i:012d}.jpg", "height": height, "width": width})
        x, y = width * (0.5 + 0.3 * np.cos(angle)), height * (0.5 + 0.3 * np.sin(angle))
        polygon = np.stack([x, y], 1).round(2).ravel().tolist()
        for _ in range(5):
            entry = {"id": len(annotations), "image_id": i, "iscrowd": 0}
            entry |= {"category_id": int(rng.integers(1, 81)), "segmentation": [polygon]}
            annotations.append(entry)
    categories = [{"id": i, "name": f"thing {i}"} for i in range(1, 81)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(root / "coco" / "annotations" / "instances_train2017.json", content)
    return root


class TimedProcessor(CoresProcessor):
    """Adds up the seconds that CLIP's and SAM's pixels take."""

    seconds: dict[str, float]

    def clip(self, image):
        return self._timed("clip", super().clip, image)

    def sam(self, image):
        return self._timed("sam", super().sam, image)

    def _timed(self, name, function, image):
        started = time.perf_counter()
        found = function(image)
        self.seconds[name] += time.perf_counter() - started
        return found


def loader(dataset_dir: Path, tokenizer_dir: Path, rounds: int) -> dict:
    """Seconds per sample of each stage and the rates, medians over the rounds."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.add_tokens(["<image>", *(f"[{level}]" for level in LEVELS)], special_tokens=True)
    tokenizer.model_max_length = 2048
    data = TrainMixture(dataset_dir, "coco", [1], LEVELS, SAMPLES)
    processor = TimedProcessor(tokenizer, CLIPImageProcessor(), IMAGE_SIZE, 256, LEVELS)
    # Reading every sample once also brings the files into the page cache.
    paths = [data[i].image_path for i in range(SAMPLES)]

    def ours() -> dict[str, float]:
        processor.seconds = {"clip": 0.0, "sam": 0.0}
        reading, started = 0.0, time.perf_counter()
        for first in range(0, SAMPLES, BATCH_SIZE):
            before = time.perf_counter()
            group = [data[i] for i in range(first, first + BATCH_SIZE)]
            reading += time.perf_counter() - before
            collate(group, processor, LEVELS, "llava_v1")
        whole = time.perf_counter() - started
        stages = {"image, masks and words": reading, **processor.seconds}
        return {"ours": whole, **stages, "tokens and stacking": whole - sum(stages.values())}

    def plain() -> dict[str, float]:
        started = time.perf_counter()
        for path in paths:
            image = cv2.imread(path)
            scale = IMAGE_SIZE / max(image.shape[:2])
            cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        return {"plain": time.perf_counter() - started}

    taken = alternate({"ours": ours, "plain": plain}, rounds)
    rows = [a | b for a, b in zip(taken["ours"], taken["plain"], strict=True)]
    middle = {name: statistics.median(row[name] for row in rows) / SAMPLES for name in rows[0]}
    conversations = [len(data[i].conversations) for i in range(0, SAMPLES, 8)]
    return {
        "samples_per_second": round(1 / middle["ours"], 2),
        "plain_opencv_per_second": round(1 / middle["plain"], 2),
        "share_of_plain": round(middle["plain"] / middle["ours"], 3),
        "ms_per_sample": {name: round(1000 * seconds, 2) for name, seconds in middle.items()},
        "conversations_per_sample": round(statistics.mean(conversations), 2),
    }


# ----------------------------------------------------------------------------------------- LLM-Seg

COUNT, SIZE = 50, (480, 640)
TOKENS = 576 + 60  # CLIP's at 336 pixels, and a question with its answer


def ellipses(count: int, rng: np.random.Generator) -> np.ndarray:
    """bool (count, *SIZE), of many sizes, as proposals are; the largest first."""
    y, x = np.ogrid[: SIZE[0], : SIZE[1]]
    out = np.zeros((count, *SIZE), dtype=bool)
    for mask in out:
        cy, cx = rng.uniform(0, SIZE[0]), rng.uniform(0, SIZE[1])
        ry, rx = np.exp(rng.uniform(np.log(6), np.log(max(SIZE) / 3), 2))
        mask[:] = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
    return out[np.argsort(-out.sum((1, 2)))]


@torch.no_grad()
def selection(repeats: int) -> dict:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    llm = LlamaModel(LlamaConfig(**llama_size(512, 1376, 8, 8), vocab_size=32000)).eval()
    dinov2 = {"hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16}
    dinov2 |= {"image_size": 518, "patch_size": 14}
    selector = Selector(SelectorConfig(dinov2=dinov2), 256).eval()
    masks = runs(ellipses(COUNT, rng))
    proposals = [Proposals(SIZE, masks, pooling_weights(masks, SIZE, 256))]
    features, text = torch.randn(1, 1024, 64, 64), torch.randn(1, 256)
    position = torch.randn(1, 256, 64, 64)
    embeddings, one = torch.randn(1, TOKENS, 512), torch.zeros(1, dtype=torch.long)

    def select() -> None:
        chosen = selector.choose(selector(text, features, proposals, one, position))
        united(chosen, proposals[0], SIZE)

    sides = {
        "language_model": lambda: llm(inputs_embeds=embeddings),
        "selection": select,
        "of_which_pooling": lambda: pool(features, stack(proposals)[0]),
    }
    result = {}
    for name, side in sides.items():
        side()  # The first call is slower.
        times = [seconds(side, time.process_time) for _ in range(repeats)]
        result[f"{name}_ms"] = 1e3 * statistics.median(times)
    return result | {"share": result["selection_ms"] / result["language_model_ms"]}


def store(images: int, folder: Path) -> dict:
    rng = np.random.default_rng(0)
    ious = rng.random(200).round(4).tolist()
    masks = ellipses(200, rng)
    found = Found(SIZE, encode_counts(masks), masks.sum((1, 2)).tolist(), ious)
    pixels = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)

    def image_of(number: int) -> np.ndarray:
        pixels[0, :2, :2].flat[:8] = np.frombuffer(np.int64(number).tobytes(), dtype=np.uint8)
        return pixels

    stored = ProposalStore(folder, "benchmark")
    for number in range(images):
        stored.write(image_of(number), found)
    source = ProposalSource(store=stored)
    source(image_of(0), "0")
    before, opened, prepared = memory_mb(), [], []
    for number in range(images):
        image = image_of(number)
        started = time.process_time()
        read = stored.read(image)
        kept = read.ranked(source.ranking, source.count)
        opened.append(time.process_time() - started)
        if number % 20 == 0:
            masks = [{"size": list(read.size), "counts": read.masks[i]} for i in kept]
            started = time.process_time()
            pooling_weights(masks, read.size, source.side)
            prepared.append(time.process_time() - started)
    return {
        "images": images,
        "file_kb": stored.path(image_of(0)).stat().st_size / 1024,
        "open_ms_median": 1e3 * statistics.median(opened),
        "open_ms_p99": 1e3 * float(np.percentile(opened, 99)),
        "weights_ms_median": 1e3 * statistics.median(prepared),
        "memory_before_mb": before["VmRSS"],
        "memory_after_mb": memory_mb()["VmRSS"],
    }


@command.entry()
def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("part", choices=["loader", "llm_seg"])
    parser.add_argument("--dataset_dir", type=Path, help="with coco/, for the loader")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "assets" / "tiny" / "llava")
    parser.add_argument("--rounds", type=int, default=5, help="of the loader")
    parser.add_argument("--images", type=int, default=1000, help="in the store of LLM-Seg")
    parser.add_argument("--repeats", type=int, default=20, help="of LLM-Seg's selection")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    result: dict = {"machine": f"{machine()}, torch {torch.__version__}"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.part == "llm_seg":
            result |= {"selection": selection(args.repeats), "store": store(args.images, folder)}
        else:
            result |= {"images": str(args.dataset_dir or "generated"), "image_size": IMAGE_SIZE}
            dataset_dir = args.dataset_dir or generate_coco(folder)
            result |= {"tokenizer": str(args.tokenizer)}
            result |= loader(dataset_dir, args.tokenizer, args.rounds)
    print(json.dumps(result, indent=1, ensure_ascii=False))
    write_json(args.json, result)


if __name__ == "__main__":
    sys.exit(main())

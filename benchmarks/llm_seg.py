"""What LLM-Seg costs beside its language model, and what its store of proposals costs.

    python -m benchmarks.llm_seg --json benchmarks/results/llm_seg.json      # minutes on 2 CPU cores

selection  one image with K = 50 proposals, at the published sizes (features 64 × 64 × 1024, width 256, two blocks, pooling side
           256), against one forward pass of a Llama of 512 × 8 layers over 576 image tokens and a short question: what a
           teacher-forced answer costs. The frozen encoders (CLIP, SAM, DINOv2) belong to neither.
store      a folder of so many images with 200 proposals each: time to open one (hash of the pixels, file, ranking), time to make
           the model's pooling weights of it, and the memory of the process before and after reading all of them.

Times are CPU time on one thread, so that other programs on the machine do not count; medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaModel

from dataset.proposals import (
    Found,
    Proposals,
    ProposalSource,
    ProposalStore,
    encode_counts,
    pooling_weights,
    runs,
)
from model.config import SelectorConfig
from model.selecting.selector import Selector, pool, stack, united

COUNT, SIZE = 50, (480, 640)
TOKENS = 576 + 60  # CLIP's at 336 pixels, and a question with its answer


def seconds(function: Callable, repeats: int) -> float:
    """Median CPU time of one call, after one that warms up."""
    function()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return statistics.median(times)


def blobs(count: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """bool (count, h, w): ellipses of many sizes, as proposals are."""
    y, x = np.ogrid[: size[0], : size[1]]
    out = np.zeros((count, *size), dtype=bool)
    for mask in out:
        cy, cx = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        ry, rx = np.exp(rng.uniform(np.log(6), np.log(max(size) / 3), 2))
        mask[:] = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
    return out[np.argsort(-out.sum((1, 2)))]


@torch.no_grad()
def selection(repeats: int) -> dict:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    llm = LlamaModel(
        LlamaConfig(
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=8,
            num_attention_heads=8,
            vocab_size=32000,
        )
    ).eval()
    dinov2 = {
        "hidden_size": 1024,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "image_size": 518,
        "patch_size": 14,
    }
    selector = Selector(SelectorConfig(dinov2=dinov2), 256).eval()
    masks = runs(blobs(COUNT, SIZE, rng))
    proposals = [Proposals(SIZE, masks, pooling_weights(masks, SIZE, 256))]
    features, text, position = (
        torch.randn(1, 1024, 64, 64),
        torch.randn(1, 256),
        torch.randn(1, 256, 64, 64),
    )
    embeddings, one = torch.randn(1, TOKENS, 512), torch.zeros(1, dtype=torch.long)

    def select() -> None:
        chosen = selector.choose(selector(text, features, proposals, one, position))
        united(chosen, proposals[0], SIZE)

    times = {
        "language_model": seconds(lambda: llm(inputs_embeds=embeddings), repeats),
        "selection": seconds(select, repeats),
        "of_which_pooling": seconds(lambda: pool(features, stack(proposals)[0]), repeats),
    }
    return {
        **{f"{name}_ms": 1e3 * t for name, t in times.items()},
        "share": times["selection"] / times["language_model"],
    }


def memory_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def store(images: int, folder: Path) -> dict:
    rng = np.random.default_rng(0)
    found = Found(
        SIZE,
        encode_counts(blobs(200, SIZE, rng)),
        list(range(200, 0, -1)),
        rng.random(200).round(4).tolist(),
    )
    pictures = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)

    def picture(number: int) -> np.ndarray:
        pictures[0, :2, :2].flat[:8] = np.frombuffer(np.int64(number).tobytes(), dtype=np.uint8)
        return pictures

    stored = ProposalStore(folder, "benchmark")
    for number in range(images):
        stored.write(picture(number), found)
    source = ProposalSource(store=stored)
    source(picture(0), "0")
    before, opened, prepared = memory_mb(), [], []
    for number in range(images):
        image = picture(number)
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
        "file_kb": stored.path(picture(0)).stat().st_size / 1024,
        "open_ms_median": 1e3 * statistics.median(opened),
        "open_ms_p99": 1e3 * float(np.percentile(opened, 99)),
        "weights_ms_median": 1e3 * statistics.median(prepared),
        "memory_before_mb": before,
        "memory_after_mb": memory_mb(),
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = {"selection": selection(args.repeats), "store": store(args.images, Path(folder))}
    result |= {"machine": platform.machine(), "torch": torch.__version__}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()

"""Memory of training on each GPU, computed without the weights and without a GPU.

    python -m benchmarks.memory                                          # the recipes of docs/recipes.md
    python -m benchmarks.memory --write docs/recipes.md                  # puts their table between the marks of that file
    python -m benchmarks.memory --model 7b --world 4 --zero_stage 2 --batch_size 1 --offload optimizer

The model is built on the meta device, so weights are counted exactly. Bytes on a GPU of W, with n
trainable weights:

    weights        frozen and trainable ones at 2 bytes (fp32: 4), packed ones as bitsandbytes packs them; ZeRO-3: divided by W
    gradients      2 n, divided by W from ZeRO-2 on; + 4 n / W in float32 while the optimizer works; + ZeRO's two buckets
    optimizer      12 n (float32 copy and two moments), divided by W from ZeRO-1 on; 0 with --offload optimizer, then on the host
    activations    the most that is alive at once in a forward and backward pass of each part, run on the meta device operation by
                   operation: the language model (with or without --gradient_checkpointing), then on top of what it keeps the
                   encoder of SAM (none with --sam_cache), then mask decoder and mask losses, then the vocabulary

The rest of the GPU is "left", for what is not counted: CUDA and the allocator (about 1 to 2 GiB),
bitsandbytes' unpacked layer and ZeRO-3's fetched layers. Computed, not measured on a GPU;
tests/benchmarks/test_memory.py compares the activations with real steps on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.chat_memory import GIB, PRECISIONS, show
from benchmarks.train_step import LEVEL_IDS, SIZES, Size, build_batch, build_model
from model import losses
from model.cores import CoresForReasoningSegmentation

LLAMA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
MODELS = {"7b": SIZES["7b-v1.5"], "13b": replace(SIZES["7b-v1.5"], llama=LLAMA_13B)}
BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in numbers
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setup:
    """How a model trains. ``bits``: of the language model's layers, 0 for ``precision``. ``batch``:
    images per GPU."""

    world: int = 1
    stage: int = 2
    batch: int = 1
    precision: str = "bf16"
    bits: int = 0
    checkpointing: bool = True
    offload: bool = False
    sam_cache: bool = False


RECIPES = {  # GPU memory in GB, model, setup; the configs are configs/recipes/
    "8×24 GB, 7B": (24, "7b", Setup(world=8, batch=2, sam_cache=True)),
    "8×24 GB, 13B": (24, "13b", Setup(world=8, batch=2, bits=4, sam_cache=True)),
    "1×80 GB, 7B": (80, "7b", Setup(batch=16)),
    "1×80 GB, 13B": (80, "13b", Setup(batch=8)),
    "1×24 GB, 7B": (24, "7b", Setup(batch=4, bits=4, sam_cache=True)),
    "1×24 GB, 13B": (24, "13b", Setup(batch=2, bits=4, sam_cache=True)),
    "1×24 GB, 7B, offload": (24, "7b", Setup(batch=1, sam_cache=True, offload=True)),
}


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, from when they are made until nothing
    holds them."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), given)
        return result

    def _count(self, storage, given: set[int]) -> None:
        key = storage._cdata
        if key in given or key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def measure(compute: Callable[[], Tensor]) -> tuple[int, int]:
    """(bytes kept for the backward pass, most bytes at once in both passes) of ``compute``;
    weights' gradients are dropped."""
    with Alive() as alive:
        result = compute()
        kept = alive.now
        if result.requires_grad:
            result.sum().backward()
    return kept, alive.peak


def drop_gradients(model: nn.Module) -> None:
    """Gradients are counted apart: a weight forgets its own as soon as it has one."""

    def forget(p: Tensor) -> None:
        p.grad = None

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(forget)


def activations(
    model: CoresForReasoningSegmentation, size: Size, sam_cache: bool
) -> dict[str, int]:
    """Part -> most bytes alive at once while it works, with what earlier parts keep. ``model``: on
    the meta device."""
    dtype = model.text_projection[0].weight.dtype
    batch = build_batch(size, "cpu", torch.float32)
    plan = model.reasoning.sharing.plan(
        batch.input_ids, batch.attention_mask, batch.image_index, "sdpa"
    )
    wanted = torch.zeros_like(plan.source, dtype=torch.bool).flatten()
    wanted[plan.place[:, :-1][batch.labels[:, 1:] >= 0]] = True
    count, grid, width = len(batch.input_ids), size.sam.grid, size.sam.prompt_dim
    hidden_size, words = size.llama["hidden_size"], int((batch.labels[:, 1:] >= 0).sum())

    def zeros(*shape: int, grad: bool = True) -> Tensor:
        return torch.zeros(*shape, device="meta", dtype=dtype, requires_grad=grad)

    def language_model() -> Tensor:
        embeddings = zeros(*plan.source.shape, hidden_size)
        return model.reasoning.hidden_states(
            embeddings, plan.mask().to("meta"), wanted=wanted.view_as(plan.source)
        )

    def clip() -> Tensor:
        with torch.no_grad():
            return model.reasoning.image_features(batch.clip_pixels.to("meta", dtype))

    def encoder() -> Tensor:
        return model.segmenting.encode(batch.sam_pixels.to("meta", dtype))

    def masks() -> Tensor:
        valid, index = zeros(size.images, grid, grid, grad=False), batch.image_index.to("meta")
        tokens = model.text_projection(zeros(count, len(LEVEL_IDS), hidden_size))
        low_res = model.segmenting(
            tokens, zeros(size.images, width, grid, grid, grad=False), index, valid
        )[0][:, -1]
        truth = torch.zeros(count, *size.original, dtype=torch.bool, device="meta")
        parts = []
        for image, own in zip(low_res.chunk(size.images), truth.chunk(size.images), strict=True):
            parts += model.objective.bce_and_dice(image, own, None, batch.resized_sizes[0])
        return torch.stack(parts)

    def vocabulary() -> Tensor:
        labels = torch.zeros(words, dtype=torch.int64, device="meta")
        return losses.text_loss(model.reasoning.llava.lm_head(zeros(words, hidden_size)), labels)

    kept, peak = measure(language_model)
    decoded = measure(masks)
    return {
        "CLIP": measure(clip)[1],
        "language model": peak,
        "SAM's encoder": 0 if sam_cache else kept + measure(encoder)[1],
        "mask decoder": kept + decoded[1],
        "vocabulary": kept + decoded[0] + measure(vocabulary)[1],
    }


def build(size: Size, setup: Setup) -> CoresForReasoningSegmentation:
    with torch.device("meta"):
        model = build_model(size, setup.checkpointing).to(DTYPES[setup.precision])
    drop_gradients(model)
    return model


def memory(size: Size, setup: Setup) -> dict[str, float]:
    """Part -> bytes on each GPU; "host" is the memory that offloading takes there, for each
    rank."""
    model, size = build(size, setup), replace(size, images=setup.batch)
    plain, small = PRECISIONS[
        "4-bit" if setup.bits == 4 else "8-bit" if setup.bits else setup.precision
    ]
    layers = model.reasoning.llava.model.language_model.layers.named_modules()
    linear = [m.weight for name, m in layers if isinstance(m, nn.Linear) and "lora_" not in name]
    weights = plain * sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    weights += (small - plain) * sum(w.numel() for w in linear) if setup.bits else 0
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = {stage: 1 / setup.world if setup.stage >= stage else 1.0 for stage in (1, 2, 3)}
    half = setup.precision != "fp32"
    state = (12 if half else 8) * n * share[1]
    bucket = min(BUCKET, n) * plain * 2 if setup.stage else 0
    return {
        "weights": weights * share[3],
        "gradients": (
            plain * n * share[2] + (4 * n * share[1] if half and not setup.offload else 0) + bucket
        ),
        "optimizer": 0.0 if setup.offload else state,
        "activations": max(activations(model, size, setup.sam_cache).values()),
        "host": state + 4 * n * share[1] if setup.offload else 0.0,
    }


def row(name: str, gigabytes: int, size: Size, setup: Setup) -> str:
    found = memory(size, setup)
    gpu = sum(v for part, v in found.items() if part != "host")
    images = f"{setup.batch} image{'s' * (setup.batch > 1)}"
    how = f"ZeRO-{setup.stage}, {f'{setup.bits} bits' if setup.bits else setup.precision}, {images}"
    how += ", cache" * setup.sam_cache + ", offload" * setup.offload
    cells = [f"{v / GIB:.1f}" for v in found.values()]
    left = gigabytes * 1e9 / GIB - gpu / GIB
    return (
        f"| {name} | {how} | "
        + " | ".join(cells[:4])
        + f" | **{gpu / GIB:.1f}** | {left:.1f} | {cells[4]} |"
    )


def format_table(rows: list[str]) -> str:
    """Markdown, in GiB."""
    heads = [
        "GiB on each GPU",
        "how",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "**sum**",
        "left",
        "host",
    ]
    return "\n".join(["| " + " | ".join(heads) + " |", "| --- | --- |" + " ---: |" * 7, *rows])


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--model", choices=list(MODELS), help="one row for this model instead of the recipes"
    )
    p.add_argument("--gpu_gb", type=int, default=24, help="memory of a GPU in 10^9 bytes")
    p.add_argument("--world", type=int, default=1)
    p.add_argument("--zero_stage", type=int, choices=[0, 1, 2, 3], default=2)
    p.add_argument("--batch_size", type=int, default=1)
    p.add_argument("--precision", choices=list(DTYPES), default="bf16")
    p.add_argument("--bits", type=int, choices=[0, 4, 8], default=0)
    p.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--offload", choices=["none", "optimizer"], default="none")
    p.add_argument("--sam_cache", action="store_true")
    p.add_argument("--write", type=Path, help="a Markdown file with the two marks")
    args = p.parse_args(argv)
    if args.world < 1 or args.batch_size < 1:
        p.error("--world and --batch_size must be at least 1")
    if args.model:
        offload, keep = args.offload == "optimizer", not args.gradient_checkpointing
        setup = Setup(
            args.world,
            args.zero_stage,
            args.batch_size,
            args.precision,
            args.bits,
            not keep,
            offload,
            args.sam_cache,
        )
        rows = [
            row(
                f"{args.world}×{args.gpu_gb} GB, {args.model}",
                args.gpu_gb,
                MODELS[args.model],
                setup,
            )
        ]
    else:
        rows = [
            row(name, gigabytes, MODELS[model], setup)
            for name, (gigabytes, model, setup) in RECIPES.items()
        ]
    table = format_table(rows)
    show(table, args.write, "benchmarks.memory", p)
    return 0


if __name__ == "__main__":
    sys.exit(main())

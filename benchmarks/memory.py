"""Memory of training and of a chat, computed without the weights and without a GPU.

    python -m benchmarks.memory                                   # the recipes of docs/recipes.md
    python -m benchmarks.memory --write docs/recipes.md           # their table, between its marks
    python -m benchmarks.memory --model 7b --world 4 --zero_stage 2 --offload optimizer
    python -m benchmarks.memory --chat --write docs/chat.md              # a chat with a 13B model
    python -m benchmarks.memory --weights --write docs/checkpoints.md    # weights of all presets

Models are built on the meta device, so weights and buffers are counted exactly. What bitsandbytes
packs are the linear layers inside the language model's decoder blocks; 8-bit rows carry one float32
scale each, 4-bit blocks of 64 one 8-bit scale and its share of a float32 one per 256 blocks; all
else stays 16-bit. Bytes of training on each of W GPUs, with n trainable weights:

weights      frozen and trainable ones at 2 bytes (fp32: 4), packed ones as above; ZeRO-3: divided
             by W
gradients    2 n, divided by W from ZeRO-2 on; + 4 n / W in float32 while the optimizer works;
             + ZeRO's two buckets
optimizer    12 n (float32 copy and two moments), divided by W from ZeRO-1 on; 0 with --offload
             optimizer, then on the host
activations  the most that is alive at once in a forward and backward pass of each part, run on the
             meta device operation by operation: the language model (with or without
             --gradient_checkpointing), then on top of what it keeps the encoder of SAM (none with
             --sam_cache), then mask decoder and mask losses, then the vocabulary

The rest of the GPU is "left", for what is not counted: CUDA and the allocator (about 1 to 2 GiB),
bitsandbytes' unpacked layer and ZeRO-3's fetched layers. A chat needs the weights, keys and values
of --context tokens and, estimated, the largest moment of SAM's encoder: a global attention block on
one picture, as three copies of its heads × 4096² logits. Computed, not measured on a GPU;
tests/benchmarks/test_memory.py compares the activations with real steps on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from benchmarks.sizes import (
    CLIP_224,
    CLIP_336,
    LLAMA_7B,
    LLAMA_13B,
    STEP_13B,
    STEP_SIZES,
    ModelSize,
    StepSize,
)
from benchmarks.train_step import LEVEL_IDS, build_batch, build_model, packed
from cores.model import CoresConfig, CoresForReasoningSegmentation, losses
from cores.model.checkpoints.precision import DTYPES
from cores.model.checkpoints.sam import PRESETS

GIB = 2**30
BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in numbers
PRECISIONS = {  # bytes of a weight that is not packed, and of one that is
    "fp32": (4.0, 4.0),
    "bf16": (2.0, 2.0),
    "8-bit": (2.0, 1.0),
    "4-bit": (2.0, 0.5 + 1 / 64 + 4 / (64 * 256)),
}
TRAINED = {"7b": STEP_SIZES["7b-v1.5"], "13b": STEP_13B}
VIT_H, CHAT_13B = PRESETS["vit_h"], "13B v1.5 (336 px, mlp2x_gelu)"
PUBLISHED = {  # a model, layers of its projector
    "7B v1 (224 px, linear)": (ModelSize(LLAMA_7B, CLIP_224, VIT_H), 1),
    "7B v1.5 (336 px, mlp2x_gelu)": (ModelSize(LLAMA_7B, CLIP_336, VIT_H), 2),
    "13B v1 (224 px, linear)": (ModelSize(LLAMA_13B, CLIP_224, VIT_H), 1),
    CHAT_13B: (ModelSize(LLAMA_13B, CLIP_336, VIT_H), 2),
}


# ---------------------------------------------------------------------------------------- training


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


def bytes_alive(compute: Callable[[], Tensor]) -> tuple[int, int]:
    """(bytes kept for the backward pass, most bytes at once in both passes) of ``compute``, see
    ``drop_gradients``."""
    with Alive() as alive:
        result = compute()
        kept = alive.now
        if result.requires_grad:
            result.sum().backward()
    return kept, alive.peak


def drop_gradients(model: nn.Module) -> None:
    """Makes every weight forget its gradient as soon as it has one, as gradients are counted
    apart."""

    def forget(p: Tensor) -> None:
        p.grad = None

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(forget)


def activations(
    model: CoresForReasoningSegmentation, size: StepSize, sam_cache: bool
) -> dict[str, int]:
    """Part -> most bytes alive at once while it works, those included that earlier parts keep.
    ``model`` is on the meta device."""
    dtype = model.text_projection[0].weight.dtype
    batch = build_batch(size, "cpu", torch.float32)
    plan, wanted = packed(model, batch)
    count, grid, width = len(batch.input_ids), size.sam.grid, size.sam.prompt_dim
    hidden_size, words = size.llama["hidden_size"], int((batch.labels[:, 1:] >= 0).sum())

    def zeros(*shape: int, grad: bool = True) -> Tensor:
        return torch.zeros(*shape, device="meta", dtype=dtype, requires_grad=grad)

    def language_model() -> Tensor:
        embeddings = zeros(*plan.source.shape, hidden_size)
        return model.reasoning.hidden_states(embeddings, plan.mask().to("meta"), wanted=wanted)

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

    kept, peak = bytes_alive(language_model)
    kept_masks, peak_masks = bytes_alive(masks)
    return {
        "CLIP": bytes_alive(clip)[1],
        "language model": peak,
        "SAM's encoder": 0 if sam_cache else kept + bytes_alive(encoder)[1],
        "mask decoder": kept + peak_masks,
        "vocabulary": kept + kept_masks + bytes_alive(vocabulary)[1],
    }


def build_trained(size: StepSize, setup: Setup) -> CoresForReasoningSegmentation:
    """A model ready to train, on the meta device."""
    with torch.device("meta"):
        model = build_model(size, setup.checkpointing).to(DTYPES[setup.precision])
    drop_gradients(model)
    return model


def training_memory(size: StepSize, setup: Setup) -> dict[str, float]:
    """Part -> bytes on each GPU; "host": bytes that offloading takes there, for each rank."""
    model, size = build_trained(size, setup), replace(size, images=setup.batch)
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


def training_table(rows: dict[str, tuple[int, str, Setup]]) -> str:
    """Markdown, in GiB. ``rows``: name -> GPU memory in GB, model, setup, as in RECIPES."""
    heads = ["how", "weights", "gradients", "optimizer", "activations", "**sum**", "left", "host"]
    lines = [f"| GiB on each GPU | {' | '.join(heads)} |", "| --- | --- |" + " ---: |" * 7]
    for name, (gigabytes, model, setup) in rows.items():
        found = training_memory(TRAINED[model], setup)
        host = found.pop("host")
        gpu = sum(found.values())
        images = f"{setup.batch} image{'s' * (setup.batch > 1)}"
        kind = f"{setup.bits} bits" if setup.bits else setup.precision
        how = f"ZeRO-{setup.stage}, {kind}, {images}"
        how += ", cache" * setup.sam_cache + ", offload" * setup.offload
        cells = " | ".join(f"{size / GIB:.1f}" for size in found.values())
        left = (gigabytes * 1e9 - gpu) / GIB
        tail = f"**{gpu / GIB:.1f}** | {left:.1f} | {host / GIB:.1f}"
        lines.append(f"| {name} | {how} | {cells} | {tail} |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------- chat


def build_published(size: ModelSize, projector_layers: int) -> CoresForReasoningSegmentation:
    """A CoReS of this size on the meta device."""
    words = {"vocab_size": 32066, "max_position_embeddings": 4096}
    llava = LlavaConfig(
        text_config=LlamaConfig(**size.llama, **words),
        vision_config=CLIPVisionConfig(**size.clip),
        tie_word_embeddings=False,
        projector_layers=projector_layers,
    )
    config = CoresConfig(llava, asdict(size.sam), ["LOC", "SEG"], [32064, 32065])
    with torch.device("meta"):
        return CoresForReasoningSegmentation(config)


def parts(model: CoresForReasoningSegmentation) -> dict[str, int]:
    """Part -> numbers in its parameters and buffers."""
    llava = model.reasoning.llava
    count = {
        "language model, decoder blocks": _count(llava.model.language_model.layers),
        "language model, word tables and norm": (
            _count(llava.model.language_model) + _count(llava.lm_head)
        ),
        "CLIP and its projector": (
            _count(llava.model.vision_tower) + _count(llava.model.multi_modal_projector)
        ),
        "SAM": _count(model.segmenting.sam),
        "projection and refiner": (
            _count(model.text_projection) + _count(model.segmenting) - _count(model.segmenting.sam)
        ),
    }
    count["language model, word tables and norm"] -= count["language model, decoder blocks"]
    if sum(count.values()) != _count(model):
        raise RuntimeError(
            f"the parts have {sum(count.values())} parameters, the model {_count(model)}"
        )
    return count


def _count(module: nn.Module) -> int:
    return sum(t.numel() for t in (*module.parameters(), *module.buffers()))


def chat_memory(model: CoresForReasoningSegmentation, context: int) -> dict[str, dict[str, float]]:
    """Precision -> part -> bytes. ``context``: tokens whose keys and values are kept."""
    text, sam = model.config.llava.text_config, model.config.sam_dims
    modules = model.reasoning.llava.model.language_model.layers.modules()
    packed_weights = [m.weight for m in modules if isinstance(m, nn.Linear)]
    linear, rows = sum(w.numel() for w in packed_weights), sum(len(w) for w in packed_weights)
    kept = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * context
    logits = sam.num_heads * sam.grid**4
    table = {}
    for name, (plain, small) in PRECISIONS.items():
        sizes = {part: plain * number for part, number in parts(model).items()}
        sizes["language model, decoder blocks"] += (small - plain) * linear + (
            4 * rows if name == "8-bit" else 0
        )
        sizes[f"keys and values, {context} tokens"] = plain * kept
        sizes["SAM's encoder at work (estimate)"] = 3 * plain * logits
        table[name] = sizes
    return table


def chat_table(model: CoresForReasoningSegmentation, context: int) -> str:
    """Markdown, in GiB; the second column in millions."""
    table, numbers = chat_memory(model, context), parts(model)
    lines = [
        "| GiB | million weights | " + " | ".join(table) + " |",
        "| --- | ---: |" + " ---: |" * len(table),
    ]
    for part in next(iter(table.values())):
        cells = [f"{sizes[part] / GIB:.2f}" for sizes in table.values()]
        lines.append(
            f"| {part} | {f'{numbers[part] / 1e6:,.1f}' if part in numbers else ''} | "
            + " | ".join(cells)
            + " |"
        )
    sums = [f"**{sum(sizes.values()) / GIB:.1f}**" for sizes in table.values()]
    lines.append(f"| **sum** | {sum(numbers.values()) / 1e6:,.1f} | " + " | ".join(sums) + " |")
    return "\n".join(lines)


def weights_table() -> str:
    """Markdown: GiB of weights of every published model with SAM ViT-H, by precision."""
    columns = " | ".join(PRECISIONS)
    lines = [f"| GiB of weights, with SAM ViT-H | millions | {columns} |"]
    lines.append("| --- |" + " ---: |" * (1 + len(PRECISIONS)))
    for name, size in PUBLISHED.items():
        model = build_published(*size)
        numbers = parts(model)
        sizes = [sum(row[part] for part in numbers) for row in chat_memory(model, 1).values()]
        cells = " | ".join(f"{size / GIB:.1f}" for size in sizes)
        lines.append(f"| {name} | {sum(numbers.values()) / 1e6:,.0f} | {cells} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ command


def put_between_marks(file: Path, name: str, table: str) -> None:
    """``table`` between <!-- name --> and <!-- end --> of a Markdown file. Raises ValueError if it
    lacks them."""
    start, stop = f"<!-- {name} -->", "<!-- end -->"
    before, mark, rest = file.read_text(encoding="utf-8").partition(start)
    _, end, after = rest.partition(stop)
    if not mark or not end:
        raise ValueError(f"{file}: has no marks {start} … {stop}")
    file.write_text(f"{before}{mark}\n{table}\n{end}{after}", encoding="utf-8")


@command.entry()
def main(argv: list[str] | None = None) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = p.add_argument
    add("--chat", action="store_true", help="a chat with a 13B model")
    add("--weights", action="store_true", help="weights alone, every published model")
    add("--context", type=int, default=2048, help="tokens of the chat, 576 of the picture included")
    add("--model", choices=list(TRAINED), help="training of this model instead of the recipes")
    add("--gpu_gb", type=int, default=24, help="memory of a GPU in 10^9 bytes")
    add("--world", type=int, default=1)
    add("--zero_stage", type=int, choices=[0, 1, 2, 3], default=2)
    add("--batch_size", type=int, default=1)
    add("--precision", choices=["fp32", "bf16"], default="bf16")
    add("--bits", type=int, choices=[0, 4, 8], default=0)
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True)
    add("--offload", choices=["none", "optimizer"], default="none")
    add("--sam_cache", action="store_true")
    add("--write", type=Path, help="a Markdown file with the marks of the table")
    args = p.parse_args(argv)
    for name in ("world", "batch_size", "context"):
        if getattr(args, name) < 1:
            p.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if args.weights:
        table = weights_table()
    elif args.chat:
        table = chat_table(build_published(*PUBLISHED[CHAT_13B]), args.context)
    elif args.model:
        setup = Setup(
            world=args.world,
            stage=args.zero_stage,
            batch=args.batch_size,
            precision=args.precision,
            bits=args.bits,
            checkpointing=args.gradient_checkpointing,
            offload=args.offload == "optimizer",
            sam_cache=args.sam_cache,
        )
        name = f"{args.world}×{args.gpu_gb} GB, {args.model}"
        table = training_table({name: (args.gpu_gb, args.model, setup)})
    else:
        table = training_table(RECIPES)
    print(table)
    if args.write:
        try:
            put_between_marks(args.write, "benchmarks.memory", table)
        except ValueError as error:
            p.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One training step: the published schedule against ours, with the same weights, batch and losses.

    python -m benchmarks.train_step --size small --json FILE      # five minutes on a CPU
    python -m benchmarks.train_step --size 7b-v1.5 --only flops   # 7B and ViT-H, on no device
    python -m benchmarks.train_step --size 7b-v1.5 --precision bf16 --gradient_checkpointing \\
        --peak_tflops 989 --json FILE                             # a GPU

A step is forward, backward and AdamW; it is checked that the losses agree.

time    The schedules take turns in one process; medians. Tokens/s counts those of the batch,
        however often a schedule reads them. Model FLOP utilisation is the schedule's own FLOPs,
        recomputation included, over what the device could have done in that time, --peak_tflops.
memory  A process per schedule: on a CPU the highest resident set above that of the process before
        it built anything, on a GPU the allocator's peak.
flops   Counted operation by operation (multiply and add are two) and attributed to the part that
        called. What multiplies no matrices (norms, resizing, softmax, most of the losses) counts
        nothing; the logits of the vocabulary do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from benchmarks import published_schedule
from benchmarks.shared import alternate, benchmark_parser, in_a_process, memory_mb, write_json
from benchmarks.sizes import STEP_SIZES, StepSize
from cores.dataset.collate import Batch
from cores.model.checkpoints.precision import DTYPES
from cores.model.config import CoresConfig
from cores.model.cores import CoresForReasoningSegmentation
from cores.model.reasoning.chain import enable_checkpointing
from cores.model.reasoning.lora import add_lora
from cores.model.segmenting.embedding_cache import SamCache
from cores.model.segmenting.frames import resized_size
from cores.model.trainable import set_trainable

VOCABULARY, IMAGE_ID, LEVEL_IDS = 32_003, 32_000, [32_001, 32_002]
SCHEDULES = ("published", "ours", "cached")


def build_model(size: StepSize, checkpointing: bool) -> CoresForReasoningSegmentation:
    """A model with random weights, ready to train as the paper does, but without dropout, since
    losses are compared."""
    text = size.llama | {"vocab_size": VOCABULARY, "max_position_embeddings": 4096}
    config = CoresConfig(
        llava=LlavaConfig(
            vision_config=CLIPVisionConfig(**size.clip),
            text_config=LlamaConfig(**text),
            image_token_index=IMAGE_ID,
        ),
        sam=asdict(size.sam),
        level_token_ids=LEVEL_IDS,
    )
    model = CoresForReasoningSegmentation(config)
    add_lora(model, dropout=0.0)
    if checkpointing:
        enable_checkpointing(model.reasoning.llava)
    set_trainable(model)
    return model.train()


def build_batch(size: StepSize, device: torch.device | str, dtype: torch.dtype) -> Batch:
    """Random pictures, tokens and targets; every conversation ends with an answer that has one
    token per level."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> Tensor:
        return torch.randint(3, IMAGE_ID, (count,), generator=generator)

    rows, labels = [], []
    for _ in range(size.images):
        prefix = torch.cat([words(size.prefix), torch.full((size.image_tokens,), IMAGE_ID)])
        for _ in range(size.conversations):
            suffix = words(size.suffix)
            suffix[-4], suffix[-2] = LEVEL_IDS[0], LEVEL_IDS[1]
            rows.append(torch.cat([prefix, suffix]))
            labels.append(rows[-1].clone())
            labels[-1][: -size.answer] = -100
    count = len(rows)
    names = [{"dataset": "random", "id": str(i), "image_path": "none"} for i in range(count)]
    side, clip_side, original = size.sam.image_size, size.clip["image_size"], size.original
    batch = Batch(
        input_ids=torch.stack(rows),
        attention_mask=torch.ones(count, len(rows[0]), dtype=torch.int64),
        labels=torch.stack(labels),
        image_index=torch.arange(size.images).repeat_interleave(size.conversations),
        clip_pixels=torch.randn(size.images, 3, clip_side, clip_side, generator=generator),
        sam_pixels=torch.randn(size.images, 3, side, side, generator=generator),
        original_sizes=[original] * size.images,
        resized_sizes=[resized_size(*original, side)] * size.images,
        target_masks=[torch.rand(1, *original, generator=generator) > 0.8 for _ in range(count)],
        ignore_masks=[None] * count,
        host_masks=[None] * count,
        info=names,
    )
    return batch.to(device, dtype)


def packed(model: CoresForReasoningSegmentation, batch: Batch):
    """The plan by which conversations share rows of the language model, and which of its outputs
    the losses read, bool (rows, length)."""
    plan = model.reasoning.sharing.plan(
        batch.input_ids, batch.attention_mask, batch.image_index, "sdpa"
    )
    wanted = torch.zeros_like(plan.source, dtype=torch.bool).flatten()
    wanted[plan.place[:, :-1][batch.labels[:, 1:] >= 0]] = True
    return plan, wanted.view_as(plan.source)


def device_name() -> str:
    """The card's name, "cpu" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


@contextmanager
def built_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules are made where and as they stay: there may be no room for 7B twice, or in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


class Bench:
    """A model, its batch, a cache of SAM's embeddings, and an optimizer whose learning rate is 0,
    so that every step sees the same weights."""

    def __init__(self, size: StepSize, args: argparse.Namespace, cache_folder: str):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = dtype = DTYPES[args.precision]
        torch.manual_seed(0)
        with built_on(self.device, dtype):
            self.model = build_model(size, args.gradient_checkpointing)
        self.model.to(self.device, dtype)
        self.attention = args.attn_implementation
        if args.compile:
            self.model.segmenting.sam.image_encoder.compile()
        self.batch = build_batch(size, self.device, dtype)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=0.0, weight_decay=0.0)
        self.cache = SamCache(cache_folder, "benchmark", args.sam_cache_dtype)

    def fill_cache(self) -> None:
        """Before the schedule "cached" can take a step."""
        for i, pixels in enumerate(self.batch.sam_pixels):
            self.cache.store(f"{i:02d}", self.model.segmenting.encode(pixels[None])[0])

    def cached_batch(self) -> Batch:
        """The batch as a data loader brings it when the cache has every image. It reads the files,
        which is therefore part of the step."""
        found = [self.cache.load(f"{i:02d}") for i in range(len(self.batch.original_sizes))]
        pixels, keys = self.batch.sam_pixels[:0], [""] * len(found)
        batch = replace(self.batch, sam_embeddings=found, sam_keys=keys, sam_pixels=pixels)
        return batch.to(self.device, self.dtype)

    def losses(self, schedule: str) -> dict[str, Tensor]:
        attention = "sdpa" if schedule == "published" else self.attention
        self.model.reasoning.llava.set_attn_implementation({"": "sdpa", "text_config": attention})
        if schedule == "published":
            return published_schedule.forward(self.model, self.batch)
        output = self.model(self.cached_batch() if schedule == "cached" else self.batch)
        return {"loss": output.loss} | output.losses

    def step(self, schedule: str) -> dict:
        """Seconds of a step and of its parts, and its losses."""
        started, cpu = self._now(), time.process_time()
        self.optimizer.zero_grad()
        found = self.losses(schedule)
        forward = self._now()
        found["loss"].backward()
        backward = self._now()
        self.optimizer.step()
        done = self._now()
        return {
            "total": done - started,
            "cpu": time.process_time() - cpu,
            "forward": forward - started,
            "backward": backward - forward,
            "optimizer": done - backward,
            "losses": {name: float(value.detach()) for name, value in found.items()},
        }

    def gradients(self, schedule: str) -> list[Tensor]:
        self.optimizer.zero_grad()
        self.losses(schedule)["loss"].backward()
        none = torch.zeros_like
        return [none(p) if p.grad is None else p.grad.clone() for p in self.trainable]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def check_losses(reference: dict[str, float], found: dict[str, float], tolerance: float) -> None:
    """Raises ValueError if a loss differs by more than ``tolerance``, relative."""
    for name, value in reference.items():
        if abs(found[name] - value) > tolerance * abs(value):
            raise ValueError(f"the schedules disagree: {name} is {found[name]}, published {value}")


def measure_time(bench: Bench, args: argparse.Namespace) -> dict:
    """Schedule -> losses, seconds of every round, and their medians."""
    tolerance = {"fp32": 1e-4, "bf16": 3e-2}[args.precision]
    bench.fill_cache()
    expected = {name: bench.step(name)["losses"] for name in SCHEDULES}  # This also warms up.
    check_losses(expected["published"], expected["ours"], tolerance)
    check_losses(expected["published"], expected["cached"], 10 * tolerance)
    rounds = alternate({name: partial(bench.step, name) for name in SCHEDULES}, args.repeats)
    keys = ("total", "cpu", "forward", "backward", "optimizer")
    return {
        name: (
            {"losses": expected[name], "rounds": [{k: r[k] for k in keys} for r in rows]}
            | {k: statistics.median(r[k] for r in rows) for k in keys}
        )
        for name, rows in rounds.items()
    }


def measure_memory(schedule: str, args: argparse.Namespace) -> dict:
    """Bytes of weights, and the peak of two steps above what the process began with. Call it in a
    fresh process."""
    begin = round(memory_mb()["VmRSS"] * 2**20)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(STEP_SIZES[args.size], args, folder)
        if schedule == "cached":
            # The encoder must not be part of the peak, so the cache is filled with zeros.
            for i in range(STEP_SIZES[args.size].images):
                dims = STEP_SIZES[args.size].sam
                bench.cache.store(f"{i:02d}", torch.zeros(dims.prompt_dim, dims.grid, dims.grid))
        for _ in range(2):
            bench.step(schedule)
    if bench.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = round(memory_mb()["VmHWM"] * 2**20) - begin
    weights = sum(p.numel() * p.element_size() for p in bench.model.parameters())
    return {"peak_bytes": peak, "begin_bytes": begin, "weight_bytes": weights}


def memory_in_a_process(schedule: str, args: argparse.Namespace) -> dict:
    names = ("size", "attn_implementation", "precision", "threads", "sam_cache_dtype")
    flags = [f"--{name}={getattr(args, name)}" for name in names]
    switches = ("compile", "gradient_checkpointing")
    flags += [f"--{name}" for name in switches if getattr(args, name)]
    return in_a_process("benchmarks.train_step", "--memory_of", schedule, *flags)


def _attention(query, key, value, *_, **__) -> int:
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def _attention_backward(grad, query, key, value, *_, **__) -> int:
    # The scores are computed again; then there are four products instead of two.
    return _attention(query, key, value) * 5 // 2


def _addmm_(own, first, second, **_) -> int:
    return 2 * first[0] * first[1] * second[1]


aten = torch.ops.aten
UNKNOWN_TO_TORCH = {  # Operations that torch's counter leaves out.
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten._scaled_dot_product_fused_attention_overrideable_backward: _attention_backward,
    aten.addmm_: _addmm_,
}


def flops(compute: Callable[[], Tensor]) -> int:
    """Of ``compute`` and, if its result needs one, of the backward pass."""
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH) as counter:
        result = compute()
        if result.requires_grad:
            result.sum().backward()
    return counter.get_total_flops()


def count_flops(size: StepSize, checkpointing: bool) -> dict[str, dict[str, int]]:
    """Schedule -> part -> FLOPs of a step, forward and backward, counted on the meta device, where
    nothing is allocated."""
    with torch.device("meta"):
        model = build_model(size, checkpointing)
        grid, width = size.sam.grid, size.sam.prompt_dim
        embeddings = torch.zeros(size.images, width, grid, grid)
        valid = torch.ones(size.images, grid, grid)
    batch = build_batch(size, "cpu", torch.float32)
    plan, wanted = packed(model, batch)
    sam_pixels = batch.sam_pixels.to("meta")
    supervised = int((batch.labels[:, 1:] >= 0).sum())
    count, levels, image_index = len(batch.input_ids), len(LEVEL_IDS), batch.image_index.to("meta")

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, device="meta", requires_grad=True)

    def clip(images: int) -> Tensor:
        with torch.no_grad():
            return model.reasoning.image_features(
                batch.clip_pixels[:1].to("meta").expand(images, -1, -1, -1)
            )

    def llm(mask: Tensor, wanted: Tensor | None) -> Tensor:
        hidden = zeros(mask.shape[0], mask.shape[2], size.llama["hidden_size"])
        return model.reasoning.hidden_states(hidden, mask.to("meta"), wanted=wanted)

    def stock() -> Tensor:
        with torch.no_grad():
            return model.segmenting.sam.image_encoder(sam_pixels)

    def chains() -> Tensor:
        tokens = zeros(size.conversations, levels, width)
        masks = [
            published_schedule._chain(model, e[None], tokens, v)
            for e, v in zip(embeddings, valid, strict=True)
        ]
        return torch.cat(masks)[:, -1]

    def decoder() -> Tensor:
        tokens = zeros(count, levels, width)
        return model.segmenting(tokens, embeddings, image_index, valid)[0][:, -1]

    lm_head, projection = model.reasoning.llava.lm_head, model.text_projection
    length, d = batch.input_ids.shape[1], size.llama["hidden_size"]
    causal = torch.ones(count, 1, length, length, dtype=torch.bool).tril()
    with published_schedule.stock_parts(model):
        published = {
            "CLIP": flops(lambda: clip(count)),
            "LLM": flops(lambda: llm(causal, None)),
            "loss": flops(lambda: lm_head(zeros(count * length, d))),
            "text projection": flops(lambda: projection(zeros(count * length, d))),
            "SAM encoder": flops(stock),
            "mask decoder": flops(chains),
        }
    ours = {
        "CLIP": flops(lambda: clip(size.images)),
        "LLM": flops(lambda: llm(plan.mask(), wanted)),
        "loss": flops(lambda: lm_head(zeros(supervised, d))),
        "text projection": flops(lambda: projection(zeros(count * levels, d))),
        "SAM encoder": flops(lambda: model.segmenting.encode(sam_pixels)),
        "mask decoder": flops(decoder),
    }
    return {"published": published, "ours": ours, "cached": ours | {"SAM encoder": 0}}


def ratios(result: dict) -> dict[str, float]:
    """Ours divided by published, of whatever was measured."""
    totals: dict[str, dict[str, float]] = {}  # of a quantity, by schedule
    if "seconds" in result:
        for kind, key in (("time", "total"), ("cpu_time", "cpu")):
            totals[kind] = {name: result["seconds"][name][key] for name in SCHEDULES}
    if "memory" in result:
        totals["peak_memory"] = {name: m["peak_bytes"] for name, m in result["memory"].items()}
    if "flops" in result:
        totals["flops"] = {name: sum(parts.values()) for name, parts in result["flops"].items()}
    out: dict[str, float] = {}
    for kind, by in totals.items():
        out[kind] = by["ours"] / by["published"]
        out[f"{kind}_cached"] = by["cached"] / by["published"]
    return out


def rates(result: dict, size: StepSize, peak_tflops: float | None) -> dict[str, dict[str, float]]:
    """Tokens/s by schedule and, where FLOPs and the device's peak are known, the share of the peak
    that is used."""
    if "seconds" not in result:
        return {}
    seconds = {name: result["seconds"][name]["total"] for name in SCHEDULES}
    tokens = size.images * size.conversations * (size.prefix + size.image_tokens + size.suffix)
    found = {"tokens_per_second": {name: tokens / seconds[name] for name in SCHEDULES}}
    if peak_tflops and "flops" in result:
        done = {name: sum(result["flops"][name].values()) for name in SCHEDULES}
        able = {name: seconds[name] * 1e12 * peak_tflops for name in SCHEDULES}
        found["utilisation"] = {name: done[name] / able[name] for name in SCHEDULES}
    return found


def step_table(result: dict) -> str:
    """What was measured, a line for each quantity and a column for each schedule."""
    lines = [f"{'':24}" + "".join(f"{name:>14}" for name in SCHEDULES)]

    def row(title: str, values: list[float]) -> None:
        lines.append(f"{title:24}" + "".join(f"{value:14.3f}" for value in values))

    if "seconds" in result:
        for key in ("total", "cpu", "forward", "backward", "optimizer"):
            row(f"{key}, seconds", [result["seconds"][name][key] for name in SCHEDULES])
    for key, values in result["rate"].items():
        row(key.replace("_", " "), [values[name] for name in SCHEDULES])
    if "memory" in result:
        row("peak memory, GB", [result["memory"][name]["peak_bytes"] / 1e9 for name in SCHEDULES])
    if "flops" in result:
        for part in result["flops"]["published"]:
            row(f"{part}, TFLOP", [result["flops"][name][part] / 1e12 for name in SCHEDULES])
        row("all, TFLOP", [sum(result["flops"][name].values()) / 1e12 for name in SCHEDULES])
    lines += [f"ratio.{name:18}{value:14.3f}" for name, value in result["ratio"].items()]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = benchmark_parser(__doc__)
    add, kinds = p.add_argument, ["time", "memory", "flops"]
    add("--size", choices=list(STEP_SIZES), default="small")
    add("--only", nargs="+", choices=kinds, default=kinds)
    add("--repeats", type=int, default=5)
    add("--threads", type=int, default=1)
    add("--precision", choices=["fp32", "bf16"], default="fp32")
    recompute = "recompute the language model's activations, in all schedules"
    add("--gradient_checkpointing", action="store_true", help=recompute)
    attention = ["sdpa", "flex_attention", "flash_attention_2"]
    add("--attn_implementation", choices=attention, default="sdpa", help="of our language model")
    compiled = "torch.compile SAM's image encoder in our schedule"
    add("--compile", action="store_true", help=compiled)
    peak = "what the device can do in --precision, dense (H100, H200 in bf16: 989)"
    add("--peak_tflops", type=float, help=peak)
    add("--sam_cache_dtype", choices=["fp16", "int8"], default="fp16")
    add("--memory_of", choices=SCHEDULES, help=argparse.SUPPRESS)
    return p


def measure(argv: list[str] | None = None) -> dict:
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        found = measure_memory(args.memory_of, args)
        print(json.dumps(found))
        return found
    settings = {k: v for k, v in vars(args).items() if k not in ("memory_of", "json")}
    result: dict = {
        "settings": settings | {"device": device_name(), "torch": torch.__version__},
        "size": asdict(STEP_SIZES[args.size]),
    }
    if "flops" in args.only:
        result["flops"] = count_flops(STEP_SIZES[args.size], args.gradient_checkpointing)
    if "memory" in args.only:
        result["memory"] = {name: memory_in_a_process(name, args) for name in SCHEDULES}
    if "time" in args.only:
        with tempfile.TemporaryDirectory() as folder:
            result["seconds"] = measure_time(Bench(STEP_SIZES[args.size], args, folder), args)
    result["ratio"] = ratios(result)
    result["rate"] = rates(result, STEP_SIZES[args.size], args.peak_tflops)
    write_json(args.json, result)
    print(step_table(result), flush=True)
    return result


@command.entry()
def main(argv: list[str] | None = None) -> int:
    measure(argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())

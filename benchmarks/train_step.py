"""One training step: the published schedule against ours. Same weights, same batch, same losses
(checked).

    python -m benchmarks.train_step --size small --json FILE      # time, peak memory and FLOPs, about five minutes on a CPU
    python -m benchmarks.train_step --size 7b-v1.5 --only flops   # a table for 7B and ViT-H, on no device at all

A step is forward, backward and AdamW. The schedules alternate in one process; times are medians.
Memory is measured in a process per schedule: on a CPU the highest resident set above that of the
process before it built anything, on a GPU the allocator's peak. FLOPs are counted operation by
operation (multiply and add are two) and attributed to the part that called; what has no matrix in
it (norms, resizing, softmax) counts nothing: of the losses, the logits of the vocabulary do.
Tokens/s counts those of the batch, however often a schedule reads them; model FLOP utilisation is
the schedule's own FLOPs (recomputation included) over what the device could have done in that time,
for which --peak_tflops speaks.

    python -m benchmarks.train_step --size 7b-v1.5 --precision bf16 --gradient_checkpointing --peak_tflops 989 --json FILE   # a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from benchmarks import published_schedule
from dataset.collate import Batch
from dataset.files.write import write_text
from model.checkpoints.sam import PRESETS
from model.config import CoresConfig, SamDims
from model.cores import CoresForReasoningSegmentation
from model.reasoning.chain import enable_checkpointing
from model.reasoning.lora import add_lora
from model.segmenting.embedding_cache import SamCache
from model.segmenting.frames import resized_size
from model.trainable import set_trainable

VOCABULARY, IMAGE_ID, LEVEL_IDS = 32_003, 32_000, [32_001, 32_002]
SCHEDULES = ("published", "ours", "cached")


@dataclass(frozen=True)
class Size:
    """A model and a batch. ``prefix``: tokens of system text and one exemplar, before the image."""

    llama: dict
    clip: dict
    sam: SamDims
    images: int = 2
    conversations: int = 3
    prefix: int = 95
    suffix: int = 80
    answer: int = 20
    original: tuple[int, int] = field(default=(480, 640))

    @property
    def image_tokens(self) -> int:
        return (self.clip["image_size"] // self.clip["patch_size"]) ** 2


def _llama(width: int, inner: int, depth: int, heads: int) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
    }


def _clip(width: int, depth: int, heads: int, patch: int, image: int) -> dict:
    return _llama(width, 4 * width, depth, heads) | {"patch_size": patch, "image_size": image}


TOY_SAM = SamDims(128, 16, 32, 2, 2, (1,), 3, 32, 4, 32, 16, 16)
# ViT-B's proportions: heads of 64
SMALL_SAM = SamDims(embed_dim=192, depth=6, num_heads=3, global_attn_indexes=(2, 5))
LLAMA_7B = _llama(4096, 11008, 32, 32)
SIZES = {
    "toy": Size(
        _llama(32, 64, 2, 2),
        _clip(32, 2, 2, 16, 64),
        TOY_SAM,
        prefix=10,
        suffix=12,
        answer=6,
        original=(48, 64),
    ),
    "small": Size(_llama(512, 1376, 8, 8), _clip(256, 6, 4, 14, 224), SMALL_SAM),
    "7b-v1": Size(LLAMA_7B, _clip(1024, 24, 16, 14, 224), PRESETS["vit_h"], images=1),
    "7b-v1.5": Size(LLAMA_7B, _clip(1024, 24, 16, 14, 336), PRESETS["vit_h"], images=1),
}


def build_model(size: Size, checkpointing: bool) -> CoresForReasoningSegmentation:
    """A model with random weights, ready to train as the paper does, but without dropout: the
    losses are compared."""
    config = CoresConfig(
        llava=LlavaConfig(
            vision_config=CLIPVisionConfig(**size.clip),
            text_config=LlamaConfig(
                **size.llama, vocab_size=VOCABULARY, max_position_embeddings=4096
            ),
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


def build_batch(size: Size, device: torch.device | str, dtype: torch.dtype) -> Batch:
    """Random pictures, tokens and targets; every conversation ends with an answer that has one
    token per level."""
    generator = torch.Generator().manual_seed(0)
    rows, labels = [], []
    for _ in range(size.images):
        prefix = torch.cat(
            [_words(size.prefix, generator), torch.full((size.image_tokens,), IMAGE_ID)]
        )
        for _ in range(size.conversations):
            suffix = _words(size.suffix, generator)
            suffix[-4], suffix[-2] = LEVEL_IDS[0], LEVEL_IDS[1]
            rows.append(torch.cat([prefix, suffix]))
            labels.append(
                rows[-1].clone().index_fill_(0, torch.arange(len(rows[-1]) - size.answer), -100)
            )
    count = len(rows)
    names = [{"dataset": "random", "id": str(i), "image_path": "none"} for i in range(count)]
    side, original = size.sam.image_size, size.original
    batch = Batch(
        input_ids=torch.stack(rows),
        attention_mask=torch.ones(count, len(rows[0]), dtype=torch.int64),
        labels=torch.stack(labels),
        image_index=torch.arange(size.images).repeat_interleave(size.conversations),
        clip_pixels=torch.randn(
            size.images, 3, size.clip["image_size"], size.clip["image_size"], generator=generator
        ),
        sam_pixels=torch.randn(size.images, 3, side, side, generator=generator),
        original_sizes=[original] * size.images,
        resized_sizes=[resized_size(*original, side)] * size.images,
        target_masks=[torch.rand(1, *original, generator=generator) > 0.8 for _ in range(count)],
        ignore_masks=[None] * count,
        host_masks=[None] * count,
        info=names,
    )
    return batch.to(device, dtype)


def _words(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, IMAGE_ID, (count,), generator=generator)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# -------------------------------------------------------------------------------------------- steps


class Bench:
    """The model, its batch, an optimizer that moves nothing (lr 0: every step sees the same
    weights) and a cache."""

    def __init__(self, size: Size, args: argparse.Namespace, cache_folder: str):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
        torch.manual_seed(0)
        with self.device, _default_dtype(dtype):  # 7B is never there twice, nor in float32
            self.model = build_model(size, args.gradient_checkpointing)
        self.model.to(self.device, dtype)
        self.attention = args.attn_implementation
        if args.compile:
            self.model.segmenting.sam.image_encoder.compile()
        self.batch = build_batch(size, self.device, dtype)
        self.dtype = dtype
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=0.0, weight_decay=0.0)
        self.cache = SamCache(cache_folder, "benchmark", args.sam_cache_dtype)

    def fill_cache(self) -> None:
        for i, pixels in enumerate(self.batch.sam_pixels):
            self.cache.store(f"{i:02d}", self.model.segmenting.encode(pixels[None])[0])

    def cached_batch(self) -> Batch:
        """The batch as a data loader brings it when the cache has every image; reading the files is
        part of the step."""
        found = [self.cache.load(f"{i:02d}") for i in range(len(self.batch.original_sizes))]
        fields = vars(self.batch) | {
            "sam_embeddings": found,
            "sam_keys": ["" for _ in found],
            "sam_pixels": self.batch.sam_pixels[:0],
        }
        return Batch(**fields).to(self.device, self.dtype)

    def losses(self, schedule: str) -> dict[str, Tensor]:
        attention = "sdpa" if schedule == "published" else self.attention
        self.model.reasoning.llava.set_attn_implementation({"": "sdpa", "text_config": attention})
        if schedule == "published":
            return published_schedule.forward(self.model, self.batch)
        output = self.model(self.cached_batch() if schedule == "cached" else self.batch)
        return {"loss": output.loss} | output.losses

    def step(self, schedule: str) -> dict:
        """Seconds of one step's parts, and its losses."""
        marks, cpu = [self._now()], time.process_time()
        self.optimizer.zero_grad()
        found = self.losses(schedule)
        marks.append(self._now())
        found["loss"].backward()
        marks.append(self._now())
        self.optimizer.step()
        marks.append(self._now())
        seconds = dict(
            zip(
                ("forward", "backward", "optimizer"),
                (b - a for a, b in zip(marks, marks[1:], strict=False)),
                strict=True,
            )
        )
        return {
            "total": marks[-1] - marks[0],
            "cpu": time.process_time() - cpu,
            **seconds,
            "losses": {name: float(value.detach()) for name, value in found.items()},
        }

    def gradients(self, schedule: str) -> list[Tensor]:
        self.optimizer.zero_grad()
        self.losses(schedule)["loss"].backward()
        return [
            p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in self.trainable
        ]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def check_equal(reference: dict[str, float], found: dict[str, float], tolerance: float) -> None:
    """Raises ValueError if a loss differs by more than ``tolerance``, relative."""
    for name, value in reference.items():
        if abs(found[name] - value) > tolerance * abs(value):
            raise ValueError(f"the schedules disagree: {name} is {found[name]}, published {value}")


def measure_time(bench: Bench, args: argparse.Namespace) -> dict:
    tolerance = {"fp32": 1e-4, "bf16": 3e-2}[args.precision]
    bench.fill_cache()
    expected = {name: bench.step(name)["losses"] for name in SCHEDULES}  # also warms up
    check_equal(expected["published"], expected["ours"], tolerance)
    check_equal(expected["published"], expected["cached"], 10 * tolerance)
    rounds: dict[str, list[dict]] = {name: [] for name in SCHEDULES}
    for _ in range(args.repeats):
        for name in SCHEDULES:
            rounds[name].append(bench.step(name))
    keys = ("total", "cpu", "forward", "backward", "optimizer")
    return {
        name: (
            {"losses": expected[name], "rounds": [{k: r[k] for k in keys} for r in rows]}
            | {k: statistics.median(r[k] for r in rows) for k in keys}
        )
        for name, rows in rounds.items()
    }


# ------------------------------------------------------------------------------------------- memory


def measure_memory(schedule: str, args: argparse.Namespace) -> dict:
    """Call in a fresh process: bytes of weights, and the peak of two steps above what the process
    began with."""
    begin = _resident()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(SIZES[args.size], args, folder)
        if schedule == "cached":
            # of zeros: their encoder must not be part of the peak
            for i in range(SIZES[args.size].images):
                dims = SIZES[args.size].sam
                bench.cache.store(f"{i:02d}", torch.zeros(dims.prompt_dim, dims.grid, dims.grid))
        for _ in range(2):
            bench.step(schedule)
    if bench.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - begin
    weights = sum(p.numel() * p.element_size() for p in bench.model.parameters())
    return {"peak_bytes": peak, "begin_bytes": begin, "weight_bytes": weights}


def _resident() -> int:
    if not Path("/proc/self/statm").exists():
        raise OSError(
            "memory is read from /proc/self/statm, which only Linux has; leave it out with --only"
            " time flops"
        )
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def memory_in_a_process(schedule: str, args: argparse.Namespace) -> dict:
    command = [
        sys.executable,
        "-m",
        "benchmarks.train_step",
        "--size",
        args.size,
        "--memory_of",
        schedule,
    ]
    command += ["--attn_implementation", args.attn_implementation]
    command += [
        "--precision",
        args.precision,
        "--threads",
        str(args.threads),
        "--sam_cache_dtype",
        args.sam_cache_dtype,
    ]
    command += ["--compile"] * args.compile
    command += ["--gradient_checkpointing"] * args.gradient_checkpointing
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1]
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# -------------------------------------------------------------------------------------------- FLOPs


def _attention(query, key, value, *_, **__) -> int:
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def _attention_backward(grad, query, key, value, *_, **__) -> int:
    return _attention(query, key, value) * 5 // 2  # scores again, then four products instead of two


def _addmm_(own, first, second, **_) -> int:
    return 2 * first[0] * first[1] * second[1]


aten = torch.ops.aten
UNKNOWN_TO_TORCH = {  # operations that torch's counter leaves out
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten._scaled_dot_product_fused_attention_overrideable_backward: _attention_backward,
    aten.addmm_: _addmm_,
}


def _count(compute: Callable[[], Tensor]) -> int:
    """FLOPs of ``compute``, and of the backward pass of what it returns if that has one."""
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH) as counter:
        result = compute()
        if result.requires_grad:
            result.sum().backward()
    return counter.get_total_flops()


def count_flops(size: Size, checkpointing: bool) -> dict[str, dict[str, int]]:
    """FLOPs of a step by schedule and part, forward and backward. Computed on no device: nothing is
    allocated."""
    with torch.device("meta"):
        model = build_model(size, checkpointing)
        grid, width = size.sam.grid, size.sam.prompt_dim
        embeddings, valid = (
            torch.zeros(size.images, width, grid, grid),
            torch.ones(size.images, grid, grid),
        )
    batch = build_batch(size, "cpu", torch.float32)
    plan = model.reasoning.sharing.plan(
        batch.input_ids, batch.attention_mask, batch.image_index, "sdpa"
    )
    wanted = torch.zeros_like(plan.source, dtype=torch.bool).flatten()
    wanted[plan.place[:, :-1][batch.labels[:, 1:] >= 0]] = True
    wanted = wanted.view_as(plan.source)
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

    heads = model.reasoning.llava.lm_head, model.text_projection
    length, d = batch.input_ids.shape[1], size.llama["hidden_size"]
    with published_schedule.stock_parts(model):
        published = {
            "CLIP": _count(lambda: clip(count)),
            "LLM": _count(
                lambda: llm(torch.ones(count, 1, length, length, dtype=torch.bool).tril(), None)
            ),
            "loss": _count(lambda: heads[0](zeros(count * length, d))),
            "text projection": _count(lambda: heads[1](zeros(count * length, d))),
            "SAM encoder": _count(stock),
            "mask decoder": _count(chains),
        }
    ours = {
        "CLIP": _count(lambda: clip(size.images)),
        "LLM": _count(lambda: llm(plan.mask(), wanted)),
        "loss": _count(lambda: heads[0](zeros(supervised, d))),
        "text projection": _count(lambda: heads[1](zeros(count * levels, d))),
        "SAM encoder": _count(lambda: model.segmenting.encode(sam_pixels)),
        "mask decoder": _count(
            lambda: model.segmenting(zeros(count, levels, width), embeddings, image_index, valid)[
                0
            ][:, -1]
        ),
    }
    return {"published": published, "ours": ours, "cached": ours | {"SAM encoder": 0}}


# ------------------------------------------------------------------------------------------- report


def ratios(result: dict) -> dict[str, float]:
    """Ours divided by published, of whatever was measured."""
    out: dict[str, float] = {}
    for kind, read in (("time", "total"), ("cpu_time", "cpu")):
        if "seconds" in result:
            own = result["seconds"]
            out[kind] = own["ours"][read] / own["published"][read]
            out[f"{kind}_cached"] = own["cached"][read] / own["published"][read]
    if "memory" in result:
        peaks = {name: memory["peak_bytes"] for name, memory in result["memory"].items()}
        out |= {
            "peak_memory": peaks["ours"] / peaks["published"],
            "peak_memory_cached": peaks["cached"] / peaks["published"],
        }
    if "flops" in result:
        totals = {name: sum(parts.values()) for name, parts in result["flops"].items()}
        out |= {
            "flops": totals["ours"] / totals["published"],
            "flops_cached": totals["cached"] / totals["published"],
        }
    return out


def rates(result: dict, size: Size, peak_tflops: float | None) -> dict[str, dict[str, float]]:
    """Tokens/s by schedule and, where FLOPs and the device's peak are known, the share of it that
    is used."""
    if "seconds" not in result:
        return {}
    seconds = {name: result["seconds"][name]["total"] for name in SCHEDULES}
    tokens = size.images * size.conversations * (size.prefix + size.image_tokens + size.suffix)
    found = {"tokens_per_second": {name: tokens / seconds[name] for name in SCHEDULES}}
    if peak_tflops and "flops" in result:
        done = {name: sum(result["flops"][name].values()) for name in SCHEDULES}
        found["utilisation"] = {
            name: done[name] / seconds[name] / (1e12 * peak_tflops) for name in SCHEDULES
        }
    return found


def table(result: dict) -> str:
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
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--size", choices=list(SIZES), default="small")
    p.add_argument("--json", type=Path, help="file for all numbers")
    p.add_argument(
        "--only",
        nargs="+",
        choices=["time", "memory", "flops"],
        default=["time", "memory", "flops"],
    )
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    p.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute the language model's activations, in all schedules",
    )
    p.add_argument(
        "--attn_implementation",
        choices=["sdpa", "flex_attention"],
        default="sdpa",
        help="of our language model",
    )
    p.add_argument(
        "--compile", action="store_true", help="torch.compile SAM's image encoder in our schedule"
    )
    p.add_argument(
        "--peak_tflops",
        type=float,
        help="what the device can do in --precision, dense (H100, H200 in bf16: 989)",
    )
    p.add_argument("--sam_cache_dtype", choices=["fp16", "int8"], default="fp16")
    p.add_argument("--memory_of", choices=SCHEDULES, help=argparse.SUPPRESS)
    return p


def main(argv: list[str] | None = None) -> dict:
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        found = measure_memory(args.memory_of, args)
        print(json.dumps(found))
        return found
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    settings = {k: v for k, v in vars(args).items() if k not in ("memory_of", "json")}
    result: dict = {
        "settings": settings | {"device": device, "torch": torch.__version__},
        "size": asdict(SIZES[args.size]),
    }
    if "flops" in args.only:
        result["flops"] = count_flops(SIZES[args.size], args.gradient_checkpointing)
    if "memory" in args.only:
        result["memory"] = {name: memory_in_a_process(name, args) for name in SCHEDULES}
    if "time" in args.only:
        with tempfile.TemporaryDirectory() as folder:
            result["seconds"] = measure_time(Bench(SIZES[args.size], args, folder), args)
    result["ratio"] = ratios(result)
    result["rate"] = rates(result, SIZES[args.size], args.peak_tflops)
    if args.json:
        write_text(args.json, json.dumps(result, indent=1) + "\n")
    print(table(result), flush=True)
    return result


if __name__ == "__main__":
    main()

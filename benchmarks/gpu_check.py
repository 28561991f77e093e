"""What a GPU says of this program, in ten minutes and in parts: is it exact, how fast, how large.

    scripts/gpu_check.sh                          # 7B v1.5 with ViT-H, random weights, bf16
    python -m benchmarks.gpu_check --size toy     # the same parts on any machine, in a minute

Every part is a process of its own with a time limit, and FILE (default:
benchmarks/results/gpu-<card>.json) is written after each. A second call goes on with what is
missing or failed; --again PART … takes parts anew.

machine      card and versions; what it can do: a product of matrices, a copy
exactness    fp32 on the device against fp32 on the processor: losses, gradients, masks; then bf16
step         a training step, published schedule against ours (benchmarks/train_step.py), with the
             share of the card's peak that is used and peak memory beside what
             benchmarks/memory.py predicts
step-…       the same with FlexAttention, flash-attn, --compile, without checkpointing
profile      where the time of our step is: the operations that take most
answer       a first answer and a follow-up of 20 tokens, evaluation in answers per second
loading      from a folder on disk to the first answer, in bf16, 8 and 4 bits
training     configs/tiny.yaml through train_ds.py: the same curve as on a processor, and its time
ranks        two ranks with a card each
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

from benchmarks.shared import ROOT, benchmark_parser, write_json

# TFLOP/s in bf16, dense, by the makers' data sheets.
PEAK_TFLOPS = {"H200": 989, "H100": 989, "GH200": 989, "A100": 312, "L40S": 362, "L4": 121}
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes", "flash_attn", "triton")
ANSWER_TOKENS = 20
GOALS = {  # what is measured: (goal, whether smaller is better)
    "utilisation": (0.40, False),
    "times as fast as published": (2.5, False),
    "peak memory over prediction": (1.15, True),
    "first answer, seconds": (0.6, True),
    "follow-up, seconds": (0.25, True),
}
STEP = ("--precision", "bf16", "--gradient_checkpointing", "--repeats", "3")


class Part(NamedTuple):
    """``limit``: seconds until it is ended. ``needs``: packages without which it is left out."""

    run: Callable[[str], dict[str, Any]]
    limit: int
    needs: tuple[str, ...] = ()
    cards: int = 0


def machine(size: str) -> dict[str, Any]:
    import torch

    from benchmarks.train_step import device_name

    device, side = device_here(), 8192 if size.startswith("7b") else 256
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = timed(lambda: a @ b)
    copy = timed(lambda: a.clone())
    found: dict[str, Any] = {
        "card": device_name(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": {name: version_of(name) for name in PACKAGES},
        "matmul_tflops": 2 * side**3 / product / 1e12,
        "copy_gb_per_second": 2 * a.numel() * a.element_size() / copy / 1e9,
    }
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        found |= {
            "memory_bytes": facts.total_memory,
            "multiprocessors": facts.multi_processor_count,
        }
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def exactness(size: str) -> dict[str, Any]:
    """Relative errors of the losses and of the whole gradient (its norm), and the share of mask
    pixels with another sign, against float32 on the processor. Raises ValueError where float32 is
    beyond what summing in another order explains."""
    import torch
    from torch import Tensor

    from benchmarks.sizes import STEP_SIZES
    from benchmarks.train_step import build_batch, build_model

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    step = STEP_SIZES["toy" if size == "toy" else "small"]
    torch.manual_seed(0)
    model, batch = build_model(step, checkpointing=False), build_batch(step, "cpu", torch.float32)
    trained = [p for p in model.parameters() if p.requires_grad]

    def measured(device: torch.device | str, dtype: torch.dtype) -> tuple[dict, Tensor, Tensor]:
        model.to(device, dtype).zero_grad()
        output = model(batch.to(device, dtype))
        output.loss.backward()
        losses = {"loss": output.loss} | output.losses
        gradient = torch.cat([p.grad.flatten().cpu().float() for p in trained])
        masks = torch.cat([m.detach().flatten().cpu().float() for m in output.low_res])
        return {k: float(v.detach()) for k, v in losses.items()}, gradient, masks

    expected, gradient, masks = measured("cpu", torch.float32)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    found = {}
    for name, dtype, limit in (("fp32", torch.float32, 1e-3), ("bf16", torch.bfloat16, None)):
        model.load_state_dict(weights)
        losses, theirs, logits = measured(device_here(), dtype)
        of_losses = {k: abs(losses[k] - v) / max(abs(v), 1e-12) for k, v in expected.items()}
        found[name] = {
            "losses": of_losses,
            "gradient": float((theirs - gradient).norm() / gradient.norm()),
            "mask_pixels": float(((logits > 0) != (masks > 0)).float().mean()),
        }
        if limit and max(found[name]["gradient"], *of_losses.values()) > limit:
            raise ValueError(f"{name} on {device_here()} is not the processor's: {found[name]}")
    return found


def step(size: str, *flags: str) -> dict[str, Any]:
    """One call of benchmarks.train_step; with memory and FLOPs if no flag asks for less."""
    from benchmarks import train_step

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step.json"
        peak = peak_tflops(train_step.device_name())
        argv = ["--size", size, *STEP, *flags, "--json", str(out)]
        train_step.measure([*argv, *(["--peak_tflops", str(peak)] if peak else [])])
        found = json.loads(out.read_text())
    if "memory" in found:
        from benchmarks.memory import Setup, training_memory
        from benchmarks.sizes import STEP_SIZES

        setup = Setup(stage=0, batch=found["size"]["images"])
        predicted = training_memory(STEP_SIZES[size], setup)
        found["predicted_bytes"] = sum(v for k, v in predicted.items() if k != "host")
    return found


def profile(size: str) -> dict[str, Any]:
    """The operations of one step of ours that take most of the device's time."""
    import torch
    from torch.profiler import ProfilerActivity

    from benchmarks import train_step
    from benchmarks.sizes import STEP_SIZES

    args = train_step.parser().parse_args(["--size", size, *STEP])
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with tempfile.TemporaryDirectory() as folder:
        bench = train_step.Bench(STEP_SIZES[size], args, folder)
        bench.step("ours")
        with torch.profiler.profile(activities=activities) as taken:
            whole = bench.step("ours")
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = sorted(taken.key_averages(), key=lambda row: -getattr(row, key))
    total = sum(getattr(row, key) for row in rows)
    return {
        "seconds": {k: whole[k] for k in ("total", "forward", "backward", "optimizer")},
        "busy_seconds": total / 1e6,
        "operations": [
            {"name": row.key[:120], "calls": row.count, "share": getattr(row, key) / total}
            for row in rows[:25]
        ],
    }


def answer(size: str) -> dict[str, Any]:
    import numpy as np
    import torch

    from benchmarks import chat
    from benchmarks.sizes import STEP_SIZES
    from benchmarks.train_step import built_on

    device = device_here()
    model_size = chat.SIZES["tiny"] if size == "toy" else STEP_SIZES[size]
    with built_on(device, torch.bfloat16):
        both = chat.BothSchedules(model_size, ANSWER_TOKENS, 5, 0 if size == "toy" else 32_000)
    both.model.to(device, torch.bfloat16)
    both.force(chat.free_tokens(ANSWER_TOKENS - 1, both.level_ids, both.end))
    pictures = [np.random.default_rng(i).integers(0, 256, (480, 640, 3)) for i in range(9)]
    pictures = [picture.astype(np.uint8) for picture in pictures]
    first, follow = [], []
    for picture in pictures[:5]:
        opened = time.perf_counter()
        session = both.segmenter.open(picture)
        result = session.ask("Where is the dog?")
        first.append(time.perf_counter() - opened)
        assert len(result.masks) == 2 or len(result.masks) == 1, result.text
        follow.append(timed_once(lambda: session.ask(chat.FOLLOW_UPS[0])))  # noqa: B023
    questions = ["Where is the dog?", *chat.FOLLOW_UPS] * 2
    batched = timed_once(lambda: both.segmenter(pictures[5:], [questions] * 4))
    return {
        "tokens": ANSWER_TOKENS,
        "first_seconds": sorted(first)[2],
        "follow_up_seconds": sorted(follow)[2],
        "answers_per_second": 4 * len(questions) / batched,
        "pictures_per_second": 4 / batched,
        "peak_bytes": peak_bytes(),
    }


def loading(size: str) -> dict[str, Any]:
    """Seconds from a folder (read once before, so that the disk is not what is measured) to a model
    that has answered, and peak memory, by number format."""
    import numpy as np
    import torch

    from benchmarks import chat
    from benchmarks.sizes import STEP_SIZES
    from benchmarks.train_step import built_on
    from cores.model import ReasoningSegmenter
    from cores.model.checkpoints.precision import quantization

    model_size = chat.SIZES["tiny"] if size == "toy" else STEP_SIZES[size]
    picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        with built_on(device_here(), torch.bfloat16):
            vocabulary = 0 if size == "toy" else 32_000
            model, processor = chat.build_random(model_size, vocabulary)
        model.to(torch.bfloat16).save_pretrained(folder)
        processor.save_pretrained(folder)
        found["folder_bytes"] = sum(f.stat().st_size for f in Path(folder).iterdir())
        del model
        for name, bits in (("bf16", None), ("8-bit", 8), ("4-bit", 4)):
            if bits and importlib.util.find_spec("bitsandbytes") is None:
                found[name] = "left out: bitsandbytes is not installed"
                continue
            reset_peak()
            how = {"quantization_config": quantization(bits)} if bits else {}
            begun = time.perf_counter()
            segmenter = ReasoningSegmenter.from_pretrained(folder, max_new_tokens=8, **how)
            loaded = time.perf_counter()
            segmenter(picture, "Where is the dog?")
            answered = time.perf_counter()
            segmenter(picture, "Where is the cat?")
            found[name] = {
                "loaded_seconds": loaded - begun,
                "answered_seconds": answered - begun,
                "warm_answer_seconds": time.perf_counter() - answered,
                "peak_bytes": peak_bytes(),
            }
            del segmenter
    return found


def training(size: str) -> dict[str, Any]:
    """The embedded default, whole (toy: 4 steps), as a user trains it."""
    from cores.dataset.synthetic.write import write_synthreason

    short = (
        ["--epochs", "1", "--steps_per_epoch", "4", "--eval_limit", "4"] if size == "toy" else []
    )
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        counts = {"train": 8, "val": 4} if size == "toy" else {}
        write_synthreason(data, **counts)
        argv = ["--config", "configs/tiny.yaml", "--dataset_dir", data, "--log_base_dir", folder]
        argv += ["--exp_name", "gpu", *short]
        begun = time.perf_counter()
        program = [sys.executable, "train_ds.py", *map(str, argv)]
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"train_ds.py ended with {done.returncode}: {done.stderr[-2000:]}")
        run = Path(folder) / "gpu"
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        return {
            "seconds": time.perf_counter() - begun,
            "log": [{k: r[k] for k in ("step", "loss", "seconds") if k in r} for r in rows],
            "metrics": json.loads((run / "metrics.json").read_text()),
        }


def ranks(size: str) -> dict[str, Any]:
    """Seconds and losses of two ranks, with a card each."""
    from cores.dataset.synthetic.write import write_synthreason

    with tempfile.TemporaryDirectory() as folder:
        write_synthreason(Path(folder) / "data", train=8, val=4)
        flags = ["--config", "configs/tiny.yaml", "--dataset_dir", f"{folder}/data", "--no_eval"]
        flags += ["--log_base_dir", folder, "--exp_name", "two", "--epochs", "1"]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        program = [*launch, "--nproc_per_node", "2", "train_ds.py", *flags, "--steps_per_epoch=4"]
        begun = time.perf_counter()
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"train_ds.py ended with {done.returncode}: {done.stderr[-2000:]}")
        rows = (Path(folder) / "two" / "log.jsonl").read_text().splitlines()
        return {"seconds": time.perf_counter() - begun, "log": [json.loads(row) for row in rows]}


def variant(*flags: str) -> Callable[[str], dict[str, Any]]:
    return lambda size: step(size, "--only", "time", *flags)


PARTS = {  # the most telling first, as the time on a card may end early
    "machine": Part(machine, 60),
    "exactness": Part(exactness, 120),
    "step": Part(step, 240),
    "answer": Part(answer, 120),
    "profile": Part(profile, 90),
    "step-flex": Part(variant("--attn_implementation", "flex_attention"), 150, ("triton",), 1),
    "step-flash": Part(
        variant("--attn_implementation", "flash_attention_2"), 90, ("flash_attn",), 1
    ),
    "step-compile": Part(variant("--compile"), 150),
    "loading": Part(loading, 180),
    "training": Part(training, 240, ("deepspeed",)),
    "ranks": Part(ranks, 120, ("deepspeed",), cards=2),
}


# ---------------------------------------------------------------------------------- what parts use


def device_here() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed_once(function: Callable[[], object]) -> float:
    """Seconds, the device's work included."""
    import torch

    begun = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def timed(function: Callable[[], object], repeats: int = 10) -> float:
    """Seconds of one call: the mean of ``repeats`` after three that are not counted."""
    timed_once(lambda: [function() for _ in range(3)])
    return timed_once(lambda: [function() for _ in range(repeats)]) / repeats


def reset_peak() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    """Of the GPU's allocator; None on a processor."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_tflops(card: str) -> float | None:
    words = re.split(r"[ \-_]", card)
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in words), None)


# -------------------------------------------------------------------------------------- the runner


def run_part(name: str, size: str) -> dict[str, Any]:
    """``name`` in a process of its own: {"result": …, "seconds": …}, or {"failed": why} or
    {"left_out": why}."""
    part, begun = PARTS[name], time.perf_counter()
    for package in part.needs:
        if importlib.util.find_spec(package) is None:
            return {"left_out": f"{package} is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        program = [sys.executable, "-m", "benchmarks.gpu_check", "--size", size, "--part", name]
        # A group of its own, so that the limit ends what the part has started, too.
        process = subprocess.Popen([*program, "--json", str(out)], cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(part.limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return {"failed": f"it took more than {part.limit} s"}
        if code or not out.is_file():
            return {"failed": f"exit code {code}; what it printed is above"}
        found = json.loads(out.read_text())
    return found | {"seconds": time.perf_counter() - begun}


def measured(parts: dict[str, Any]) -> dict[str, float]:
    """What GOALS ask for, of the parts that have been taken."""
    found: dict[str, float] = {}
    results = {name: part["result"] for name, part in parts.items() if "result" in part}
    if step_ := results.get("step"):
        found["times as fast as published"] = 1 / step_["ratio"]["time"]
        if "utilisation" in step_["rate"]:
            found["utilisation"] = step_["rate"]["utilisation"]["ours"]
        peak = step_["memory"]["ours"]["peak_bytes"]
        found["peak memory over prediction"] = peak / step_["predicted_bytes"]
    if answered := results.get("answer"):
        found["first answer, seconds"] = answered["first_seconds"]
        found["follow-up, seconds"] = answered["follow_up_seconds"]
    return found


def summary(parts: dict[str, Any], of_7b: bool) -> str:
    """A line for each part, then what was measured beside its goal, which is one of a 7B."""
    lines = []
    for name, part in parts.items():
        said = part.get("failed") or part.get("left_out") or f"{part['seconds']:.0f} s"
        state = "failed: " if "failed" in part else "left out: " if "left_out" in part else ""
        lines.append(f"{name:14}{state}{said}")
    for what, value in measured(parts).items():
        goal, smaller = GOALS[what]
        met = value <= goal if smaller else value >= goal
        judged = f"   goal {'≤' if smaller else '≥'} {goal:g}: {'met' if met else 'missed'}"
        lines.append(f"{what:28}{value:8.3f}{judged if of_7b else ''}")
    return "\n".join(lines)


def check(args: argparse.Namespace) -> int:
    """Runs what is missing within the time; the exit code is 1 if a part failed."""
    file, parts = args.json, {}
    if file and file.is_file():
        parts = json.loads(file.read_text())["parts"]
    until = time.perf_counter() + args.minutes * 60
    if "machine" in args.again or "result" not in parts.get("machine", {}):
        parts["machine"] = run_part("machine", args.size)
    if "result" not in parts["machine"]:
        raise RuntimeError(f"this machine cannot be measured: {parts['machine']}")
    card = parts["machine"]["result"]["card"]
    if file is None:
        name = re.sub(r"\W+", "-", card).strip("-").lower()
        file = ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
        if file.is_file():
            parts = json.loads(file.read_text())["parts"] | {"machine": parts["machine"]}
    for name, part in PARTS.items():
        done = "result" in parts.get(name, {}) and name not in args.again
        if done or (args.only and name not in args.only):
            continue
        if time.perf_counter() + part.limit / 4 > until:
            print(f"{name}: no time left; the same command goes on", flush=True)
            continue
        print(f"== {name} (at most {part.limit} s)", flush=True)
        parts[name] = run_part(name, args.size)
        program = f"python -m benchmarks.gpu_check --size {args.size}"
        write_json(file, {"command": program, "card": card, "parts": parts})
    print(summary(parts, args.size.startswith("7b")), f"written to {file}", sep="\n", flush=True)
    return int(any("failed" in part for part in parts.values()))


@command.entry(stopped="stopped; the same command goes on with what is missing")
def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__)
    add = parser.add_argument
    add("--size", choices=["toy", "small", "7b-v1", "7b-v1.5"], default="7b-v1.5")
    add("--minutes", type=float, default=10.0, help="no part is begun that could end later")
    add("--only", nargs="+", choices=list(PARTS), default=[], help="these parts alone")
    add("--again", nargs="+", choices=list(PARTS), default=[], help="also where there is a result")
    add("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.part:
        return check(args)
    import torch

    cards, needed = torch.cuda.device_count(), PARTS[args.part].cards
    if cards < needed:
        write_json(args.json, {"left_out": f"GPUs: {cards} here, {needed} needed"})
        return 0
    write_json(args.json, {"result": PARTS[args.part].run(args.size)})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The server of OpenAI's protocol under load: answers in a second, their times, and memory.

    python -m benchmarks.serve --version runs/demo/model --json benchmarks/results/serve.json

--clients ask at once, each one question after another, --requests in all, about eight pictures
drawn for it; half of the answers are streamed. Every answer is compared with that of Python to the
same picture. Memory is that of the server's process, after the first tenth of the requests and at
the end.
"""

from __future__ import annotations

import base64
import io
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

import httpx
import numpy as np
import openai
from PIL import Image

from benchmarks.shared import ROOT, benchmark_parser, machine, write_json
from cores.dataset.synthetic.scenes import make_scene
from cores.model import ReasoningSegmenter

QUESTION = "which part does it use to move?"
PICTURES = 8


def pictures() -> list[np.ndarray]:
    return [make_scene(np.random.default_rng(seed)).image for seed in range(PICTURES)]


def resident_mb(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


@command.entry()
def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--version", required=True, help="model folder")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=1000)
    args = parser.parse_args(argv)
    scenes = pictures()
    segmenter = ReasoningSegmenter.from_pretrained(args.version, max_new_tokens=24)
    expected = [segmenter.open(scene).ask(QUESTION) for scene in scenes]
    parts = []
    for scene in scenes:
        out = io.BytesIO()
        Image.fromarray(scene).save(out, "PNG")
        url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
        image = {"type": "image_url", "image_url": {"url": url}}
        parts.append([image, {"type": "text", "text": QUESTION}])
    program = [sys.executable, "-m", "cores", "serve", "--version", args.version, "--port", "0"]
    program += ["--max_queue", str(args.clients), "--max_new_tokens", "24"]
    server = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        base = server.stdout.readline().strip()
        while httpx.get(base.removesuffix("/v1") + "/health").status_code != 200:
            time.sleep(0.2)
        client = openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=600)
        model = client.models.list().data[0].id
        memory: list[float] = []

        def ask(number: int) -> tuple[float, bool]:
            begun, which = time.perf_counter(), number % PICTURES
            messages = [{"role": "user", "content": parts[which]}]
            create = client.chat.completions.create
            if number % 2:
                chunks = list(create(model=model, messages=messages, stream=True))
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                masks = chunks[-1].choices[0].delta.masks
            else:
                message = create(model=model, messages=messages).choices[0].message
                text, masks = message.content, message.masks
            ours = expected[which]
            same = text == ours.text and [m["rle"] for m in masks] == [m.rle for m in ours.masks]
            if number in (args.requests // 10, args.requests - 1):
                memory.append(resident_mb(server.pid))
            return time.perf_counter() - begun, same

        begun = time.perf_counter()
        with ThreadPoolExecutor(args.clients) as pool:
            found = list(pool.map(ask, range(args.requests)))
        taken = time.perf_counter() - begun
    finally:
        server.terminate()
        server.wait(60)
    seconds = sorted(second for second, _ in found)
    result = {
        "command": f"python -m benchmarks.serve --version {args.version}",
        "machine": machine(),
        "clients": args.clients,
        "requests": args.requests,
        "wrong": sum(not same for _, same in found),
        "answers_per_second": args.requests / taken,
        "median_seconds": statistics.median(seconds),
        "p95_seconds": seconds[int(0.95 * len(seconds))],
        "memory_mb": memory,
    }
    write_json(args.json, result)
    print(*(f"{name}: {value}" for name, value in result.items()), sep="\n")
    return int(bool(result["wrong"]))


if __name__ == "__main__":
    sys.exit(main())

"""The server of OpenAI's protocol under load: answers in a second, their times, and memory.

    python -m benchmarks.serve --version runs/demo/model --json benchmarks/results/serve.json

--clients ask at once, each one question after another, --requests in all, about --pictures drawn
for it, which are more than the server keeps as the model reads them; half of the answers are
streamed. Every text and every mask is compared with that of Python to the same picture. Memory is
that of the server's process which no other one shares, ten times on the way.
"""

from __future__ import annotations

import base64
import io
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

import httpx
import numpy as np
import openai
from PIL import Image

from benchmarks.page import memory
from benchmarks.shared import ROOT, benchmark_parser, machine, write_json
from cores.dataset.synthetic.scenes import make_scene
from cores.model import ReasoningSegmenter

QUESTION = "which part does it use to move?"
TOKENS = 24


@command.entry()
def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--version", required=True, help="model folder")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=50)
    args = parser.parse_args(argv)
    report = measure(args.version, args.clients, args.requests, args.pictures)
    report = {"command": f"python -m benchmarks.serve --version {args.version}", **report}
    write_json(args.json, report)
    print(*(f"{name}: {value}" for name, value in report.items()), sep="\n")
    return int(bool(report["wrong"]))


def measure(version: str, clients: int, requests: int, pictures: int) -> dict:
    """What the benchmark prints."""
    scenes = [make_scene(np.random.default_rng(seed)).image for seed in range(pictures)]
    segmenter = ReasoningSegmenter.from_pretrained(version, max_new_tokens=TOKENS)
    expected, parts = [], []
    for scene in scenes:
        ours = segmenter.open(scene).ask(QUESTION)
        levels = [rle for m in ours.to_dict()["masks"] for rle in (*m["chain"], m)]
        expected.append((ours.text, [level["rle"] for level in levels]))
        out = io.BytesIO()
        Image.fromarray(scene).save(out, "PNG")
        url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
        image = {"type": "image_url", "image_url": {"url": url}}
        parts.append([image, {"type": "text", "text": QUESTION}])
    program = [sys.executable, "-m", "cores", "serve", "--version", version, "--port", "0"]
    program += ["--queue", str(clients), "--max_new_tokens", str(TOKENS)]
    server = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    done, rows = count(1), []
    try:
        base = server.stdout.readline().strip()
        while httpx.get(base.removesuffix("/v1") + "/health").status_code != 200:
            time.sleep(0.2)
        client = openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=600)
        model = client.models.list().data[0].id

        def ask(number: int) -> tuple[float, bool]:
            begun, which = time.perf_counter(), number % pictures
            request = {"model": model, "messages": [{"role": "user", "content": parts[which]}]}
            create = client.chat.completions.create
            if number % 2:
                chunks = list(create(**request, stream=True))
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                masks = chunks[-1].choices[0].delta.masks
            else:
                message = create(**request).choices[0].message
                text, masks = message.content, message.masks
            taken = time.perf_counter() - begun
            found = text, [mask["rle"] for mask in masks if mask["rle"]]
            if (ready := next(done)) % max(1, requests // 10) == 0:
                rows.append({"requests": ready, "memory_mb": round(memory(server.pid), 1)})
            return taken, found == expected[which]

        begun = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            found = list(pool.map(ask, range(requests)))
        taken = time.perf_counter() - begun
    finally:
        server.terminate()
        server.wait(60)
    seconds = sorted(second for second, _ in found)
    return {
        "machine": machine(),
        "clients": clients,
        "requests": requests,
        "pictures": pictures,
        "wrong": sum(not same for _, same in found),
        "different_answers": len({str(one) for one in expected}),
        "answers_per_second": round(requests / taken, 2),
        "median_seconds": round(statistics.median(seconds), 2),
        "p95_seconds": round(seconds[int(0.95 * len(seconds))], 2),
        "rows": sorted(rows, key=lambda row: row["requests"]),
    }


if __name__ == "__main__":
    sys.exit(main())

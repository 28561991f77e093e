"""The page (app.py) under load: are memory and disk flat, does everybody get their own answer?

    python -m benchmarks.page --version runs/demo/model [--conversations N] [--at_once N]

Starts the page as a process of its own and asks it as browsers do, over HTTP. First, --at_once
visitors come one after another, each with a picture of its own: their answers are the right ones.
Then they come together, each with an open page, a further question after the first, and every
answer is compared with the right one: its text, its masks (COCO JSON as downloaded), and the
questions in it, which nobody else asked. Then --conversations visitors, one after another; memory
and disk are read ten times on the way. All pictures are noise, 480 × 640.
"""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

import http.client

import numpy as np
from PIL import Image

from benchmarks.shared import ROOT, benchmark_parser, machine, write_json

WAIT = 600  # seconds for one answer


class PageClient:
    """One open page. ``address``: of the server; ``numbers``: what ``handlers`` gives."""

    def __init__(self, address: str, numbers: dict[str, int]):
        self.where, self.numbers = urlsplit(address), numbers
        self.key = uuid.uuid4().hex
        self._heartbeat = self._connect()
        self._heartbeat.request("GET", f"/gradio_api/heartbeat/{self.key}")
        self._alive = self._heartbeat.getresponse()

    def close(self) -> None:
        self._alive.close()
        self._heartbeat.close()

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.where.hostname or "", self.where.port, timeout=WAIT)

    def request(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> bytes:
        """Raises OSError for any other status than 200."""
        connection = self._connect()
        try:
            connection.request(method, path, body, {"Content-Type": kind} if kind else {})
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise OSError(f"{method} {path}: {answer.status} {content[:200]!r}")
            return content
        finally:
            connection.close()

    def upload(self, name: str, content: bytes) -> str:
        """The path that the server gives a file."""
        edge = uuid.uuid4().hex
        head = (
            f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
            "Content-Type: image/png\r\n\r\n"
        )
        body = head.encode() + content + f"\r\n--{edge}--\r\n".encode()
        kind = f"multipart/form-data; boundary={edge}"
        return json.loads(self.request("POST", "/gradio_api/upload", body, kind))[0]

    def call(self, handler: str, *values: Any) -> list[Any]:
        """The last of what a handler of the page shows, and what it says before, if it fails, as a
        RuntimeError."""
        asked = {"data": values, "fn_index": self.numbers[handler], "session_hash": self.key}
        join = "/gradio_api/queue/join"
        self.request("POST", join, json.dumps(asked).encode(), "application/json")
        shown: list[Any] = []
        connection = self._connect()
        try:
            connection.request("GET", f"/gradio_api/queue/data?session_hash={self.key}")
            answer = connection.getresponse()
            for line in answer:
                if not line.startswith(b"data:"):
                    continue
                message = json.loads(line[5:])
                if message["msg"] == "process_completed" and not message["success"]:
                    raise RuntimeError(message["output"].get("error"))
                if message["msg"] == "process_generating":
                    shown = _changed(shown, message["output"]["data"])
                elif message["msg"] == "close_stream":
                    return shown
        finally:
            connection.close()
        raise RuntimeError(f"{handler}: no answer")

    def open(self, content: bytes) -> None:
        sent = self.upload("picture.png", content)
        self.call("open", {"path": sent, "meta": {"_type": "gradio.FileData"}})

    def ask(self, question: str) -> dict[str, Any]:
        """{"said": questions and answers, "masks": annotations of the COCO JSON}."""
        shown = self.call("ask", question, "answer", 45)
        coco = shown[-1]["value"]["path"] if isinstance(shown[-1], dict) else None
        said = [_text(message["content"]) for message in shown[1]]
        masks: list[dict] = []
        if coco is not None:
            path = f"/gradio_api/file={quote(coco)}"
            masks = json.loads(self.request("GET", path))["annotations"]
        return {"said": said, "masks": masks}


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _changed(before: list[Any], data: list[Any]) -> list[Any]:
    """gradio sends what a generator shows whole at first, and then as changes of it."""
    if not before:
        return data
    return [
        _patched(old, new) if _is_patch(new) else new for old, new in zip(before, data, strict=True)
    ]


def _is_patch(new: Any) -> bool:
    kinds = ("replace", "append", "add", "delete")
    return isinstance(new, list) and all(
        isinstance(edit, list) and len(edit) == 3 and edit[0] in kinds for edit in new
    )


def _patched(old: Any, edits: list[Any]) -> Any:
    out = {"": json.loads(json.dumps(old))}
    for action, path, value in edits:
        *way, last = ["", *path]
        place: Any = out
        for key in way:
            place = place[key]
        if action == "replace":
            place[last] = value
        elif action == "append":
            place[last] += value
        elif action == "delete":
            del place[last]
        elif isinstance(place, list):
            place.insert(last, value)
        else:
            place[last] = value
    return out[""]


@contextmanager
def started(version: str, folder: Path, *flags: str) -> Iterator[tuple[str, int]]:
    """A page as a process of its own, whose temporary files lie in ``folder``: (address, process
    id). Raises RuntimeError with its errors where it does not start, or does not end in order."""
    command = [sys.executable, str(ROOT / "app.py"), "--version", version, "--port", "0", *flags]
    environment = {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        ["env", *(f"{k}={v}" for k, v in environment.items()), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    errors: list[str] = []
    assert process.stdout is not None and process.stderr is not None
    threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True).start()
    try:
        line = process.stdout.readline()
        if not line.startswith("open "):
            process.wait(10)
            raise RuntimeError("".join(errors)[-2000:])
        yield line.split()[1], process.pid
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            raise RuntimeError(f"exit code {process.returncode}: {''.join(errors)[-2000:]}")
    finally:
        process.kill()
        process.wait()


def handlers(address: str) -> dict[str, int]:
    """Handler of the page -> its number, from what the server tells every browser."""
    where = urlsplit(address)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=WAIT)
    connection.request("GET", "/config")
    config = json.load(connection.getresponse())
    connection.close()
    inputs = {4: "ask", 1: "open"}  # by what they take; their names are not told
    found: dict[str, int] = {}
    for dependency in config["dependencies"]:
        name = dependency.get("api_name") or inputs.get(len(dependency["inputs"]))
        if name:
            found.setdefault(name, dependency["id"])
    return found


def noise(number: int) -> bytes:
    """A PNG of its own for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.repeat(16, 0).repeat(16, 1)).save(file, "PNG")
    return file.getvalue()


def memory(process: int) -> float:
    """MiB of a process that no other one shares."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise OSError("memory is read from /proc, which only Linux has")


def disk(folder: Path) -> float:
    """MiB of all files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def visit(address: str, numbers: dict[str, int], picture: int, name: str) -> list[dict[str, Any]]:
    """One visitor with two questions: its answers. ``name`` stands in the questions."""
    client = PageClient(address, numbers)
    try:
        client.open(noise(picture))
        return [client.ask(f"where is {name}?"), client.ask(f"and {name} again?")]
    finally:
        client.close()


def mixed(answers: list[dict[str, Any]], right: list[dict[str, Any]], name: str) -> bool:
    """Whether answers are not those of this visitor."""
    said = [text for answer in answers for text in answer["said"]]
    asked = [text for text in said[-4::2]]
    replies = [answer["said"][1::2] for answer in answers]
    return (
        any(name not in text for text in asked)
        or replies != [answer["said"][1::2] for answer in right]
        or [answer["masks"] for answer in answers] != [answer["masks"] for answer in right]
    )


@command.entry()
def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--version", default="runs/demo/model", help="model folder")
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--at_once", type=int, default=50)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(args.version, Path(folder), args.conversations, args.at_once)
    print(json.dumps(report, indent=1))
    write_json(args.json, report)
    return 0


def measure(version: str, folder: Path, conversations: int, at_once: int) -> dict[str, Any]:
    """What the benchmark prints. ``folder``: an empty one."""
    with started(version, folder, "--max_new_tokens", "12") as (address, process):
        numbers = handlers(address)
        right = [visit(address, numbers, n, f"alone{n}") for n in range(at_once)]
        begun = time.perf_counter()
        with ThreadPoolExecutor(at_once) as pool:
            together = list(
                pool.map(lambda n: visit(address, numbers, n, f"visitor{n}x"), range(at_once))
            )
        took = time.perf_counter() - begun
        wrong = sum(mixed(answers, right[n], f"visitor{n}x") for n, answers in enumerate(together))
        print(f"{at_once} at once: {took:.1f} s, {wrong} wrong", file=sys.stderr)
        rows = [{"conversations": 0, "memory_mb": memory(process), "disk_mb": disk(folder)}]
        sequence = time.perf_counter()
        for n in range(conversations):
            answers = visit(address, numbers, n % at_once, f"later{n}x")
            wrong += mixed(answers, right[n % at_once], f"later{n}x")
            if (n + 1) % max(1, conversations // 10) == 0:
                row = {"memory_mb": memory(process), "disk_mb": disk(folder)}
                rows.append({"conversations": n + 1} | row)
                print(rows[-1], file=sys.stderr)
        sequence = time.perf_counter() - sequence
    return {
        "machine": machine(),
        "at_once": {"visitors": at_once, "seconds": round(took, 1)},
        "in_sequence": {"seconds": round(sequence, 1), "rows": _rounded(rows)},
        "wrong_answers": wrong,
        "different_masks": len({json.dumps([answer["masks"] for answer in one]) for one in right}),
        "files_left": sum(path.is_file() for path in folder.rglob("*")),
    }


def _rounded(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: round(value, 1) for name, value in row.items()} for row in rows]


if __name__ == "__main__":
    sys.exit(main())

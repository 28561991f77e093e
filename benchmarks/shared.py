"""What the benchmarks share: the frame of a command, clocks, memory, processes of their own.

It imports neither torch nor a model, as benchmarks/data_index.py measures processes without them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cores.dataset.files.write import write_text

ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with --json, whose help is the head of a module."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=layout)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser


def write_json(file: Path | None, result: dict) -> None:
    """Writes ``result`` if there is a ``file`` for it."""
    if file:
        write_text(file, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def machine() -> str:
    return f"{os.cpu_count()} × {platform.machine()}, Python {platform.python_version()}"


def seconds(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one call. ``clock`` time.process_time leaves out other programs on the machine."""
    started = clock()
    function()
    return clock() - started


def alternate(sides: dict[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Side -> what its calls return. The sides take turns, so that a slow spell of the machine
    meets all of them."""
    found: dict[str, list[T]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            found[name].append(side())
    return found


def memory_mb() -> dict[str, float]:
    """MiB of this process: VmHWM (peak), VmRSS, RssAnon (not shared) and RssFile (mapped files,
    which the system may take back). Raises OSError where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise OSError(f"memory is read from {status}, which only Linux has")
    lines = (line.split() for line in status.read_text().splitlines())
    wanted = ("VmHWM:", "VmRSS:", "RssAnon:", "RssFile:")
    return {words[0][:-1]: int(words[1]) / 1024 for words in lines if words[0] in wanted}


def in_a_process(module: str, *arguments: object) -> dict:
    """The JSON in the last line that ``python -m module`` prints. Raises RuntimeError with the end
    of its errors if it fails."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])

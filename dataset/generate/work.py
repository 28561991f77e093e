"""Doing many items at once, in an order that does not show in the result; and files that are whole
or not there."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from dataset.files.write import write_text
from dataset.generate.client import Abort, ChatError, NotAsked

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Outcome(Generic[Result]):
    """``results`` in the order of the items, None where there is none; ``errors`` says why, except
    in a dry run."""

    results: list[Result | None]
    errors: list[str]


def run_all(
    items: Sequence[Item],
    do: Callable[[Item], Result],
    concurrent: int,
    stop: threading.Event,
    give_up_after: int,
    progress: str | None = None,
) -> Outcome[Result]:
    """``do`` of every item in ``concurrent`` threads. ``progress``: title of the bar, None for
    none.

    Raises Abort after ``give_up_after`` items in a row got no answer, and whatever else ``do``
    raises; ``stop`` is set then, and requests that are under way are waited for, so that their
    answers are not lost.
    """
    outcome: Outcome[Result] = Outcome([None] * len(items), [])
    errors: dict[int, str] = {}
    in_a_row = 0
    with (
        ThreadPoolExecutor(concurrent) as pool,
        tqdm(total=len(items), desc=progress, disable=progress is None) as bar,
    ):
        waiting = iter(enumerate(items))
        running: dict[Future, int] = {}
        try:
            while True:
                # not all at once: 10,000 scenes with their masks would be in memory
                for index, item in waiting:
                    running[pool.submit(do, item)] = index
                    if len(running) == 2 * concurrent:
                        break
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in sorted(done, key=running.__getitem__):
                    index = running.pop(future)
                    bar.update()
                    try:
                        outcome.results[index] = future.result()
                        in_a_row = 0
                    except NotAsked:
                        continue
                    except ChatError as error:
                        errors[index] = str(error)
                        in_a_row += 1
                    if in_a_row == give_up_after:
                        raise Abort(
                            f"{in_a_row} items in a row got no answer (the last: {errors[index]})"
                        )
        except BaseException:
            stop.set()
            for future in running:
                future.cancel()
            raise
    outcome.errors = [errors[index] for index in sorted(errors)]
    return outcome


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def tally(reasons: Iterable[str]) -> dict[str, int]:
    """How often each reason occurs, the most frequent first."""
    counts: dict[str, int] = {}
    for reason in reasons:
        counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))

"""One run of the command: the models it asks, or their stand-ins in a dry run; the items it works
on, many at a time; and the report."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import threading
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from cores.dataset.command import shown
from cores.dataset.files.write import write_text
from cores.dataset.generate.client import (
    Abort,
    ChatClient,
    ChatError,
    ChatModel,
    Endpoint,
    LocalModel,
    NotAsked,
    Pacer,
    local_key,
)
from cores.dataset.generate.estimate import DryRun, Price, StageEstimate, cost_by_stage
from cores.dataset.generate.journal import Answer, Journal, read_answers

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Outcome(Generic[Result]):
    """``results`` in the order of the items, None where there is none; ``errors`` says why, except
    in a dry run."""

    results: list[Result | None]
    errors: list[str]


class GenerationRun:
    """One call of the command. Nothing is written before the first ``chat``."""

    def __init__(self, args: Namespace):
        self.args = args
        self.folder = args.out.with_name(f"{args.out.name}.generation")
        self.stop = threading.Event()
        self.estimates: dict[str, StageEstimate] = defaultdict(StageEstimate)
        self.prices: dict[str, Price] = defaultdict(lambda: Price(args.price_in, args.price_out))
        self._models: list[ChatModel] = []
        self._pacer = Pacer(args.requests_per_minute, self.stop)

    @cached_property
    def _journal(self) -> Journal:
        return Journal(self.folder / "journal.jsonl")

    @cached_property
    def _answers(self) -> dict[str, Answer]:
        return read_answers(self.folder / "journal.jsonl")[0]

    def chat(self, model: str = "", base_url: str = "", key_env: str = "") -> ChatModel:
        """A model behind an endpoint; "" stands for the flag. Raises ValueError."""
        a = self.args
        known = {field.name for field in fields(Endpoint)}
        settings = {name: value for name, value in vars(a).items() if name in known}
        # Another host does not get the key that was meant for the first.
        key = os.environ.get(key_env or ("" if base_url else a.api_key_env), "").strip()
        settings |= {"model": model or a.model, "base_url": base_url or a.base_url, "api_key": key}
        endpoint = Endpoint(**settings)
        if a.dry_run:
            return self._dry_run(endpoint.key, a.max_tokens, getattr(a, "tokens_per_image", 0))
        self._models.append(ChatClient(endpoint, self._journal, self._pacer, self.stop))
        return self._models[-1]

    def captioner(self) -> ChatModel | None:
        """The model that --captioner names; None to go without. Raises ValueError."""
        a = self.args
        if a.captioner == "none":
            return None
        if a.captioner == "chat":
            price_in = a.price_in if a.captioner_price_in is None else a.captioner_price_in
            price_out = a.price_out if a.captioner_price_out is None else a.captioner_price_out
            self.prices["caption"] = Price(price_in, price_out)
            return self.chat(a.captioner_model, a.captioner_url, a.captioner_key_env)
        self.prices["caption"] = Price()
        name = f"{a.captioner} {a.captioner_model}"
        module, _, function = a.captioner.partition(":")
        try:
            load = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"--captioner {a.captioner}: {error}; give chat, none or module:function"
            ) from None
        if a.dry_run:
            return self._dry_run(partial(local_key, name), 0, 0)
        self._models.append(LocalModel(load(a.captioner_model), name, self._journal))
        return self._models[-1]

    def _dry_run(self, key: Callable, max_tokens: int, tokens_per_image: int) -> DryRun:
        return DryRun(key, self._answers, self.estimates, max_tokens, tokens_per_image)

    def do_all(self, items: Sequence[Item], do: Callable[[Item], Result]) -> Outcome[Result]:
        """``do`` of every item in --concurrent threads; the order of replies does not show.

        Raises Abort after --give_up_after items in a row got no answer, and whatever else ``do``
        raises. ``stop`` is set then, and requests that are under way are waited for, so that their
        answers are not lost.
        """
        a = self.args
        results: list[Result | None] = [None] * len(items)
        errors: dict[int, str] = {}
        in_a_row = 0
        quiet = a.quiet or a.dry_run
        with (
            ThreadPoolExecutor(a.concurrent) as pool,
            tqdm(total=len(items), desc=a.command, disable=quiet) as bar,
        ):
            waiting = iter(enumerate(items))
            running: dict[Future[Result], int] = {}
            try:
                while True:
                    # A few at a time: all the masks of 10,000 scenes would not fit into memory.
                    for index, item in waiting:
                        running[pool.submit(do, item)] = index
                        if len(running) == 2 * a.concurrent:
                            break
                    if not running:
                        break
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in sorted(done, key=running.__getitem__):
                        index = running.pop(future)
                        bar.update()
                        try:
                            results[index] = future.result()
                            in_a_row = 0
                        except NotAsked:
                            continue
                        except ChatError as error:
                            errors[index] = str(error)
                            in_a_row += 1
                        if in_a_row == a.give_up_after:
                            raise Abort(
                                f"{in_a_row} items in a row got no answer (the last:"
                                f" {errors[index]})"
                            )
            except BaseException:
                self.stop.set()
                for future in running:
                    future.cancel()
                raise
        return Outcome(results, [errors[index] for index in sorted(errors)])

    def finish(
        self, outcome: Outcome, refused: list[str], summary: str, facts: dict[str, Any]
    ) -> int:
        """Writes the report, prints the lines of the end and returns the exit code."""
        used = [
            (stage, answer) for model in self._models for (stage, _), answer in model.used.items()
        ]
        cost = cost_by_stage(used, self.prices)
        # Only the kind of a reason is counted, without the object before it and the word after it.
        kinds = Counter(
            re.sub(r' \("[^"]*"\)$', "", reason.rsplit(": ", 1)[-1]) for reason in refused
        )
        reasons = dict(sorted(kinds.items(), key=lambda pair: (-pair[1], pair[0])))
        report = facts | {"refused": reasons, "cost": cost, "errors": outcome.errors}
        write_json(self.folder / "report.json", report)
        print(shown(f"{self.args.out}: {summary}"))
        for reason, count in list(reasons.items())[:5]:
            print(shown(f"  refused {count} times: {reason}"))
        answers = sum(row["requests"] for row in cost.values())
        dollars = sum(row["usd"] for row in cost.values())
        print(f"  {answers} answers, {dollars:.4f} USD; journal and report in {self.folder}")
        if outcome.errors:
            print(
                f"error: {len(outcome.errors)} of {len(outcome.results)} items have no answer, for"
                f" example:\nerror: {shown(outcome.errors[0])}; the same command asks"
                " for them again",
                file=sys.stderr,
            )
        return 1 if outcome.errors else 0

    def close(self) -> None:
        """Closes connections and journal."""
        for model in self._models:
            model.close()
        if "_journal" in vars(self):
            self._journal.close()


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is whole or not there."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

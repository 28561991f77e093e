"""What the commands share: the models to ask, or their stand-ins in a dry run, what was asked, and
the report."""

from __future__ import annotations

import importlib
import os
import re
import sys
import threading
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

from dataset.generate.client import CallableChat, Chat, ChatClient, Endpoint, Pacer, callable_key
from dataset.generate.estimate import DryRun, Price, new_counts, spent
from dataset.generate.journal import Answer, Journal, read_answers
from dataset.generate.work import Outcome, run_all, tally, write_json


class Session:
    """One call of the command. Nothing is written before the first ``chat``."""

    def __init__(self, args: Namespace):
        self.args = args
        self.work = args.out.with_name(f"{args.out.name}.generation")
        self.stop = threading.Event()
        self.counts = new_counts()
        self.prices: dict[str, Price] = defaultdict(lambda: Price(args.price_in, args.price_out))
        self._chats: list[Any] = []
        self._pacer = Pacer(args.requests_per_minute, self.stop)

    @cached_property
    def _journal(self) -> Journal:
        return Journal(self.work / "journal.jsonl")

    @cached_property
    def _answers(self) -> dict[str, Answer]:
        return read_answers(self.work / "journal.jsonl")[0]

    def chat(self, model: str = "", base_url: str = "", key_env: str = "") -> Chat:
        """A model to talk to; "" stands for the flag. Raises ValueError."""
        a = self.args
        endpoint = Endpoint(
            base_url=base_url or a.base_url,
            model=model or a.model,
            # another host does not get the key that was meant for the first
            api_key=os.environ.get(key_env or ("" if base_url else a.api_key_env), "").strip(),
            max_tokens=a.max_tokens,
            temperature=a.temperature,
            seed=a.seed,
            image_side=getattr(a, "image_side", 1024),
            extra=a.extra,
            timeout=a.timeout,
            retries=a.retries,
            backoff=a.backoff,
            max_wait=a.max_wait,
        )
        if a.dry_run:
            tokens_per_image = getattr(a, "tokens_per_image", 0)
            return self._keep(
                DryRun(endpoint.key, self._answers, self.counts, a.max_tokens, tokens_per_image)
            )
        return self._keep(ChatClient(endpoint, self._journal, self._pacer, self.stop))

    def captioner(self) -> Chat | None:
        """What --captioner says; None to go without. Raises ValueError."""
        a = self.args
        if a.captioner == "none":
            return None
        if a.captioner == "chat":
            price_in = a.price_in if a.captioner_price_in is None else a.captioner_price_in
            price_out = a.price_out if a.captioner_price_out is None else a.captioner_price_out
            self.prices["caption"] = Price(price_in, price_out)
            return self.chat(a.captioner_model, a.captioner_url, a.captioner_key_env)
        self.prices["caption"] = Price()
        load, name = _local(a.captioner), f"{a.captioner} {a.captioner_model}"
        if a.dry_run:
            return self._keep(DryRun(partial(callable_key, name), self._answers, self.counts, 0, 0))
        return self._keep(CallableChat(load(a.captioner_model), name, self._journal))

    def _keep(self, chat: Any) -> Any:
        self._chats.append(chat)
        return chat

    def run(self, items: Sequence[Any], do: Callable[[Any], Any]) -> Outcome:
        """``do`` of every item, see run_all."""
        title = None if self.args.quiet or self.args.dry_run else self.args.command
        return run_all(items, do, self.args.concurrent, self.stop, self.args.give_up_after, title)

    def finish(
        self, outcome: Outcome, refused: list[str], summary: str, facts: dict[str, Any]
    ) -> int:
        """Writes the report, prints the lines of the end and returns the exit code."""
        used = [(stage, answer) for chat in self._chats for (stage, _), answer in chat.used.items()]
        cost = spent(used, self.prices)
        # what names the object or the word differs from case to case; the reason alone is what is
        # counted
        reasons = tally(
            re.sub(r' \("[^"]*"\)$', "", reason.rsplit(": ", 1)[-1]) for reason in refused
        )
        report = facts | {"refused": reasons, "cost": cost, "errors": outcome.errors}
        write_json(self.work / "report.json", report)
        print(f"{self.args.out}: {summary}")
        for reason, count in list(reasons.items())[:5]:
            print(f"  refused {count} times: {reason}")
        asked = sum(row["requests"] for row in cost.values())
        print(
            f"  {asked} answers, {sum(row['usd'] for row in cost.values()):.4f} USD; journal and"
            f" report in {self.work}"
        )
        if outcome.errors:
            print(
                f"error: {len(outcome.errors)} of {len(outcome.results)} items have no answer, for"
                " example:",
                file=sys.stderr,
            )
            print(
                f"error: {outcome.errors[0]}; the same command asks for them again", file=sys.stderr
            )
        return 1 if outcome.errors else 0

    def close(self) -> None:
        """Closes connections and journal."""
        for chat in self._chats:
            chat.close()
        if "_journal" in vars(self):
            self._journal.close()


def _local(spec: str) -> Callable[[str], Callable]:
    """The function of "module:function"; it takes --captioner_model and returns describe(image,
    instruction)."""
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--captioner {spec}: {error}; give chat, none or module:function"
        ) from None

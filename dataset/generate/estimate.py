"""What a run would cost, without asking anybody, and what it did cost.

Tokens of text are estimated as a quarter of its characters, which is close for English; a picture
costs what the flag says.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from typing import Any

from cores.dataset.generate.client import NotAsked, Request, texts_of
from cores.dataset.generate.journal import Answer

CHARACTERS_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    tokens_in: float = 0.0
    tokens_out: float = 0.0

    def of(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / 1e6


@dataclass
class StageEstimate:
    """The requests of one stage."""

    answered: int = 0
    """Requests whose answer is in the journal already."""
    requests: int = 0
    """Requests to be sent."""
    most: int = 0
    """Requests to be sent if the checks refuse every answer as often as they may."""
    tokens_in: int = 0
    """Tokens of ``most`` requests."""
    tokens_out: int = 0
    """Tokens of their answers, each as long as allowed."""


class DryRun:
    """Stands in for a model: answers from the journal, counts the other requests, sends nothing."""

    def __init__(
        self,
        key: Callable[[Request], str],
        answers: dict[str, Answer],
        estimates: dict[str, StageEstimate],
        max_tokens: int,
        tokens_per_image: int,
    ):
        """``key``: that of the model it stands in for. ``estimates``: by stage, counted up here."""
        self.used: dict[tuple[str, str], Answer] = {}  # a dry run makes no result
        self._key, self._answers, self._estimates = key, answers, estimates
        self._max_tokens, self._tokens_per_image = max_tokens, tokens_per_image
        self._lock = threading.Lock()
        self._seen: set[tuple[str, str]] = set()

    def ask(self, request: Request) -> Answer:
        """The answer of the journal or the request's stand-in. Raises NotAsked where there is
        neither."""
        key = self._key(request)
        with self._lock:
            # Photographs with equal objects have one key here, as their stand-in summaries are
            # equal; their real summaries will differ, so each is counted.
            if (key, request.item) not in self._seen:
                self._seen.add((key, request.item))
                self._count(request, key in self._answers)
        if key in self._answers:
            return self._answers[key]
        if request.stand_in is None:
            raise NotAsked
        return Answer(request.stand_in, "stop")

    def _count(self, request: Request, answered: bool) -> None:
        estimate = self._estimates[request.stage]
        if answered:
            estimate.answered += 1
            return
        texts = texts_of(request.messages)
        prompt = sum(math.ceil(len(text) / CHARACTERS_PER_TOKEN) for text in texts)
        prompt += TOKENS_PER_MESSAGE * len(texts) + self._tokens_per_image * len(request.images)
        rounds = range(1 + request.more)
        estimate.requests += 1
        estimate.most += len(rounds)
        # Each further round repeats the messages and the answers before it.
        estimate.tokens_in += sum(prompt + number * self._max_tokens for number in rounds)
        estimate.tokens_out += len(rounds) * self._max_tokens

    def close(self) -> None:
        """Nothing to close."""


def estimate_table(estimates: dict[str, StageEstimate], prices: dict[str, Price]) -> str:
    """The lines that --dry_run prints."""
    row = "{:<12}{:>10}{:>10}{:>10}{:>14}{:>14}{:>10}".format
    lines = [row("stage", "answered", "requests", "at most", "tokens in", "tokens out", "USD")]
    total = 0.0
    for stage, estimate in estimates.items():
        cost = prices[stage].of(estimate.tokens_in, estimate.tokens_out)
        total += cost
        lines.append(row(stage, *astuple(estimate), f"{cost:.4f}"))
    lines.append(f"at most {total:.4f} USD at the prices given; nothing was sent")
    return "\n".join(lines)


def cost_by_stage(used: Iterable[tuple[str, Answer]], prices: dict[str, Price]) -> dict[str, Any]:
    """Requests, tokens and dollars by stage of the (stage, answer) pairs that made the result;
    failed attempts are not in it. "uncounted": answers whose tokens the server did not count."""
    table: dict[str, Any] = {}
    empty = {"requests": 0, "tokens_in": 0, "tokens_out": 0, "usd": 0.0, "uncounted": 0}
    for stage, answer in used:
        row = table.setdefault(stage, dict(empty))
        row["requests"] += 1
        row["tokens_in"] += answer.tokens_in or 0
        row["tokens_out"] += answer.tokens_out or 0
        row["uncounted"] += answer.tokens_in is None or answer.tokens_out is None
    for stage, row in table.items():
        row["usd"] = round(prices[stage].of(row["tokens_in"], row["tokens_out"]), 6)
    return dict(sorted(table.items()))

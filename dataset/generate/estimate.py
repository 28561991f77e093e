"""What a run would cost, without asking anybody, and what it did cost.

Tokens of text are estimated as a quarter of its characters, which is close for English; a picture
costs what the flag says.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dataset.generate.client import NotAsked, Request, texts_of
from dataset.generate.journal import Answer

CHARACTERS_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    tokens_in: float = 0.0
    tokens_out: float = 0.0

    def of(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / 1e6


def tokens_of(text: str) -> int:
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


@dataclass
class Count:
    """Requests of one stage."""

    answered: int = 0
    """In the journal already."""
    requests: int = 0
    """To be sent."""
    most: int = 0
    """To be sent if the checks refuse every answer as often as they may."""
    tokens_in: int = 0
    """Of ``most``."""
    tokens_out: int = 0
    """Of ``most``, each answer as long as allowed."""


class DryRun:
    """Stands in for a client: answers from the journal, counts the rest, sends nothing."""

    def __init__(
        self,
        key: Callable[[Request], str],
        answers: dict[str, Answer],
        counts: dict[str, Count],
        max_tokens: int,
        tokens_per_image: int,
    ):
        """``key``: that of the client it stands in for."""
        self._key, self._answers, self._counts = key, answers, counts
        self._max_tokens, self._tokens_per_image = max_tokens, tokens_per_image
        self._lock = threading.Lock()
        self._seen: set[tuple[str, str]] = set()

    def ask(self, request: Request) -> Answer:
        """The answer of the journal or the request's stand-in. Raises NotAsked where there is
        neither."""
        key = self._key(request)
        with self._lock:
            # by item, too: two photos differ in what their stand-ins do not show
            if (key, request.item) not in self._seen:
                self._seen.add((key, request.item))
                self._count(request, key in self._answers)
        if key in self._answers:
            return self._answers[key]
        if request.stand_in is None:
            raise NotAsked
        return Answer(request.stand_in, "stop")

    def _count(self, request: Request, answered: bool) -> None:
        count = self._counts[request.stage]
        if answered:
            count.answered += 1
            return
        texts = texts_of(request.messages)
        asked = (
            sum(map(tokens_of, texts))
            + TOKENS_PER_MESSAGE * len(texts)
            + self._tokens_per_image * len(request.images)
        )
        rounds = range(1 + request.more)
        count.requests += 1
        count.most += len(rounds)
        # each further round repeats the talk so far
        count.tokens_in += sum(asked + number * self._max_tokens for number in rounds)
        count.tokens_out += len(rounds) * self._max_tokens

    def close(self) -> None:
        """Nothing to close."""


def new_counts() -> dict[str, Count]:
    return defaultdict(Count)


def estimate_table(counts: dict[str, Count], prices: dict[str, Price]) -> str:
    """The lines that --dry_run prints."""
    lines = [
        f"{'stage':<12}{'answered':>10}{'requests':>10}{'at most':>10}{'tokens in':>14}{'tokens out':>14}{'USD':>10}"
    ]
    total = 0.0
    for stage, count in counts.items():
        cost = prices[stage].of(count.tokens_in, count.tokens_out)
        total += cost
        numbers = f"{count.answered:>10}{count.requests:>10}{count.most:>10}{count.tokens_in:>14}{count.tokens_out:>14}"
        lines.append(f"{stage:<12}{numbers}{cost:>10.4f}")
    lines.append(f"at most {total:.4f} USD at the prices given; nothing was sent")
    return "\n".join(lines)


def spent(used: Iterable[tuple[str, Answer]], prices: dict[str, Price]) -> dict[str, Any]:
    """Requests, tokens and dollars by stage of the (stage, answer) pairs that made the result;
    failed attempts are not in it."""
    table: dict[str, Any] = {}
    for stage, answer in used:
        row = table.setdefault(
            stage, {"requests": 0, "tokens_in": 0, "tokens_out": 0, "usd": 0.0, "uncounted": 0}
        )
        row["requests"] += 1
        row["tokens_in"] += answer.tokens_in or 0
        row["tokens_out"] += answer.tokens_out or 0
        row["uncounted"] += answer.tokens_in is None or answer.tokens_out is None
    for stage, row in table.items():
        row["usd"] = round(prices[stage].of(row["tokens_in"], row["tokens_out"]), 6)
    return dict(sorted(table.items()))

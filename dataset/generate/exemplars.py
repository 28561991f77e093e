"""New pairs for the library of in-context exemplars (dataset/conversation/exemplars.json), domain
by domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dataset.generate import checks, prompts
from dataset.generate.client import Chat
from dataset.generate.talk import Talk, talk


def texts(entry: dict[str, str]) -> str:
    return f"{entry['q']} {entry['a']}"


def grow(
    domain: str, library: Sequence[dict[str, str]], count: int, chat: Chat, rounds: int
) -> Talk:
    """``count`` pairs of ``domain`` that the ``library`` does not have, or as many as pass the
    checks in so many ``rounds``.

    Raises ChatError, Abort.
    """
    known = [texts(entry) for entry in library]

    def check(entry: Any, accepted: list[Any]) -> str | None:
        q, a = (entry.get("q"), entry.get("a")) if isinstance(entry, dict) else (None, None)
        return checks.check_exemplar(q, a, [*known, *map(texts, accepted)])

    def missing(accepted: list[Any]) -> str:
        left = count - len(accepted)
        return f"{left} in number, about other parts" if left > 0 else ""

    messages = prompts.exemplar_messages(
        domain, count, [entry["q"] for entry in library if entry.get("domain") == domain]
    )
    result = talk(chat, "exemplars", domain, messages, "pairs", check, missing, rounds)
    result.accepted = [
        {"domain": domain, "q": entry["q"], "a": entry["a"]} for entry in result.accepted
    ]
    return result


def merge(
    library: Sequence[dict[str, str]], grown: Sequence[Talk | None]
) -> tuple[list[dict[str, str]], list[str]]:
    """(library with what was grown, reasons of what was refused); domains do not know of each other
    until here."""
    whole, refused = list(library), []
    for result in grown:
        if result is None:
            continue
        refused += result.refused
        for entry in result.accepted:
            reason = checks.check_exemplar(
                entry["q"], entry["a"], [texts(other) for other in whole]
            )
            if reason is None:
                whole.append(entry)
            else:
                refused.append(reason)
    return whole, refused

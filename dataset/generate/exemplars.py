"""New pairs for the library of in-context exemplars (dataset/conversation/exemplars.json), domain
by domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cores.dataset.generate import checks, prompts
from cores.dataset.generate.ask import CheckedEntries, ask_for_list
from cores.dataset.generate.client import ChatModel


def _texts(entries: Sequence[dict[str, str]]) -> list[str]:
    return [f"{entry['q']} {entry['a']}" for entry in entries]


def grow(
    domain: str, library: Sequence[dict[str, str]], count: int, chat: ChatModel, rounds: int
) -> CheckedEntries:
    """``count`` pairs of ``domain`` that the ``library`` does not have, or as many as pass the
    checks in so many ``rounds``.

    Raises ChatError, Abort.
    """
    known = _texts(library)

    def check(entry: Any, accepted: list[Any]) -> str | None:
        q, a = (entry.get("q"), entry.get("a")) if isinstance(entry, dict) else (None, None)
        return checks.check_exemplar(q, a, known + _texts(accepted))

    def missing(accepted: list[Any]) -> str:
        left = count - len(accepted)
        return f"{left} in number, about other parts" if left > 0 else ""

    taken = [entry["q"] for entry in library if entry.get("domain") == domain]
    messages = prompts.exemplar_messages(domain, count, taken)
    result = ask_for_list(chat, "exemplars", domain, messages, "pairs", check, missing, rounds)
    result.accepted = [{"domain": domain, "q": e["q"], "a": e["a"]} for e in result.accepted]
    return result


def merge(
    library: Sequence[dict[str, str]], grown: Sequence[CheckedEntries | None]
) -> tuple[list[dict[str, str]], list[str]]:
    """(library with the new pairs, reasons of what was refused). Pairs are checked again, because
    the domains were asked for without knowing of each other."""
    whole, refused = list(library), []
    for result in grown:
        if result is None:
            continue
        refused += result.refused
        for entry in result.accepted:
            reason = checks.check_exemplar(entry["q"], entry["a"], _texts(whole))
            if reason is None:
                whole.append(entry)
            else:
                refused.append(reason)
    return whole, refused

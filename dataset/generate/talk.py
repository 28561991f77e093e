"""Asking until the checks are content: a reply is taken apart, what is good is kept, the rest is
asked for once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dataset.generate.checks import parse_list
from dataset.generate.client import Chat, Request
from dataset.generate.prompts import Messages, repair


@dataclass
class Talk:
    """What came of it."""

    accepted: list[Any] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """One reason for every entry that was refused, in order."""


def talk(
    chat: Chat,
    stage: str,
    item: str,
    messages: Messages,
    name: str,
    check: Callable[[Any, list[Any]], str | None],
    missing: Callable[[list[Any]], str],
    rounds: int,
) -> Talk:
    """Asks at most ``rounds`` times for the list ``name``.

    ``check(entry, accepted)``: why an entry is refused, or None. ``missing(accepted)``: what is
    still wanted, in words for the model; "" ends the talk. Raises what ``Chat.ask`` raises.
    """
    result = Talk()
    for number in range(rounds):
        answer = chat.ask(Request(stage, item, messages, number=number, more=rounds - 1 - number))
        try:
            entries: Sequence[Any] = parse_list(answer.text, answer.finish, name)
            complaints = []
        except ValueError as error:
            entries, complaints = [], [str(error)]
        for entry in entries:
            if not missing(result.accepted):
                break  # more than was asked for
            reason = check(entry, result.accepted)
            if reason is None:
                result.accepted.append(entry)
            else:
                complaints.append(reason)
        result.refused += complaints
        wanted = missing(result.accepted)
        if not wanted:
            break
        messages = repair(messages, answer.text, complaints or ["there were too few"], wanted)
    return result

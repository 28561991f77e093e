"""Asking until the checks are content: the good entries of a reply are kept, the others are asked
for once more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cores.dataset.generate.checks import parse_list
from cores.dataset.generate.client import ChatModel, Request
from cores.dataset.generate.prompts import Messages, repair


@dataclass
class CheckedEntries:
    """What the model wrote, after the checks."""

    accepted: list[Any] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """One reason for every entry that was refused, in order."""


def ask_for_list(
    chat: ChatModel,
    stage: str,
    item: str,
    messages: Messages,
    name: str,
    check: Callable[[Any, list[Any]], str | None],
    missing: Callable[[list[Any]], str],
    rounds: int,
) -> CheckedEntries:
    """Asks at most ``rounds`` times for the list ``name``.

    ``check(entry, accepted)``: why an entry is refused, or None. ``missing(accepted)``: what is
    still wanted, in words for the model; "" ends the asking. Raises what ``ChatModel.ask`` raises.
    """
    result = CheckedEntries()
    for number in range(rounds):
        answer = chat.ask(Request(stage, item, messages, number=number, more=rounds - 1 - number))
        complaints: list[str] = []
        try:
            entries = parse_list(answer.text, answer.finish, name)
        except ValueError as error:
            entries, complaints = [], [str(error)]
        for entry in entries:
            if not missing(result.accepted):
                break  # the model wrote more than was asked for
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

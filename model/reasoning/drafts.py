"""Prompt lookup decoding: what an answer repeats is drafted and then read in one pass, where it
would take one pass a word.

The answers of one conversation are alike ("It appears on [LOC]. It is [SEG]."), so the previous
answer foretells the next. A draft is only a guess: the model reads it and keeps as much of it as it
would have said itself, so nothing but the time changes. (Several tokens at once are rounded
otherwise than one: of two words that are equally likely to the last bit, it may say the other one.)
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import takewhile

SAME = 3, 6  # ids in a row: fewer foretell too little, more than these foretell no better


def draft(ids: Sequence[int], count: int, stops: Container[int]) -> list[int]:
    """At most ``count`` ids that may follow ``ids``: what followed the last ids the last time they
    stood there.

    Of several such places the one that more ids lead up to, at most 6, and of these the last.
    Nothing where no three ids were there before; none of ``stops``, nor what follows it: what ends
    an answer or is no word.
    """
    length, where = SAME[0] - 1, 0
    for place in range(len(ids) - 1, SAME[0] - 1, -1):
        if ids[place - 1] != ids[-1]:
            continue
        same = _common_end(ids, place)
        if same > length:
            length, where = same, place
        if same == SAME[1]:
            break
    return list(
        takewhile(lambda token: token not in stops, ids[where : where + count] if where else [])
    )


def _common_end(ids: Sequence[int], place: int) -> int:
    """How many ids before ``place`` are the same as at the end, 6 at most."""
    most = min(SAME[1], place)
    return next((n for n in range(most) if ids[place - 1 - n] != ids[-1 - n]), most)

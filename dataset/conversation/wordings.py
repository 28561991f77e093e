"""How questions and answers are worded: the sentences around a name, and those around [LOC] and
[SEG]."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from cores.dataset.conversation.turns import Answer, AnswerToken

# {where} stands for the tokens before the last one, {last} for the last one. The first wording of
# each list is the canonical one of teacher-forced evaluation.
ONE_LEVEL_WORDINGS: tuple[str, ...] = (
    "It is {last}.",
    "Sure, {last}.",
    "Sure, it is {last}.",
    "Sure, the segmentation result is {last}.",
    "{last}.",
)
_APPEARS = (
    "It appears on {where}.",
    "It usually appears on {where}.",
    "It typically appears on {where}.",
    "It can be found on {where}.",
    "We usually find it on {where}.",
    "It belongs to {where}.",
    "Sure, it appears on {where}.",
    "Sure, it usually appears on {where}.",
    "Sure, it is a part of {where}.",
)
MULTI_LEVEL_WORDINGS = tuple(
    f"{first} {last}"
    for last in ("It is {last}.", "The segmentation result is {last}.")
    for first in _APPEARS
)
_ONE_LEVEL_NEXT = " Another is {last}."
_MULTI_LEVEL_NEXT = " Another appears on {where}. It is {last}."
SENTENCE_QUESTIONS = (
    "{text} Please output segmentation mask.",
    "{text} Please respond with segmentation mask.",
)
PHRASE_QUESTIONS = (
    "What is {text} in this image? Please output segmentation mask.",
    "What is {text} in this image? Please respond with segmentation mask.",
    "Can you segment {text} in this image?",
    "Please segment {text} in this image.",
    "Can you show me {text} in this image?",
    "Please mark {text} in this image.",
)
EXPLAIN_SUFFIXES = (
    "Please output segmentation mask and explain why.",
    "Please output segmentation mask and give the reason.",
    "Please respond with segmentation mask and some explanation.",
)


def _pick(wordings: Sequence[str], rng: np.random.Generator | None) -> str:
    return wordings[0] if rng is None else wordings[int(rng.integers(len(wordings)))]


# The full stops, question and exclamation marks of the world's scripts, and what may close after
# them there.
SENTENCE_ENDS = frozenset(".?!。？！｡．…‼⁇⁈⁉؟۔।॥።፧፨։။៕᙮᠃᠉꓿꛳꛷︒﹒﹖﹗")
CLOSING = "」』”’»）】》"


def is_sentence(text: str) -> bool:
    """Whether a query ends as a sentence does, in whatever script, and is asked as it stands."""
    return text.rstrip(CLOSING)[-1:] in SENTENCE_ENDS


def sentence_question(text: str, rng: np.random.Generator | None = None) -> str:
    """The question for a query that is a sentence. ``rng`` None gives the canonical wording."""
    return _pick(SENTENCE_QUESTIONS, rng).format(text=text)


def phrase_question(phrase: str, rng: np.random.Generator | None = None) -> str:
    """The question for a phrase such as "the dog". ``rng`` None gives the canonical wording."""
    return _pick(PHRASE_QUESTIONS, rng).format(text=phrase)


def explain_question(text: str, rng: np.random.Generator | None = None) -> str:
    """The question for a query that also asks for the reason."""
    return f"{text} {_pick(EXPLAIN_SUFFIXES, rng)}"


def _fill(wording: str, levels: Sequence[str]) -> Answer:
    """One wording with the tokens of one target in it; levels between the first and the last read
    "at [PART]"."""
    where: Answer = []
    for level in levels[:-1]:
        where += [", at ", AnswerToken(level)] if where else [AnswerToken(level)]
    pieces: dict[str, Answer] = {"{where}": where, "{last}": [AnswerToken(levels[-1])]}
    answer: Answer = []
    for text in re.split(r"(\{where\}|\{last\})", wording):
        answer += pieces.get(text, [text] if text else [])
    return answer


def answer(
    levels: Sequence[str],
    rng: np.random.Generator | None = None,
    explanation: str | None = None,
    targets: int = 1,
) -> Answer:
    """An answer with one group of ``levels`` tokens per target.

    ``rng`` draws the wording (None: the canonical one); ``explanation`` is appended after the
    tokens.
    """
    if not levels:
        raise ValueError('levels is empty; give at least one answer token, for example ["SEG"]')
    if targets < 1:
        raise ValueError(
            f"an answer with tokens needs at least one target, got {targets}; text-only answers are"
            " plain text"
        )
    wordings, following = ONE_LEVEL_WORDINGS, _ONE_LEVEL_NEXT
    if len(levels) > 1:
        wordings, following = MULTI_LEVEL_WORDINGS, _MULTI_LEVEL_NEXT
    parts = _fill(_pick(wordings, rng), levels)
    for _ in range(targets - 1):
        parts += _fill(following, levels)
    if explanation:
        parts.append(" " + explanation.strip())
    return parts

"""Questions and answers as data: the turns of a conversation, the special tokens of an answer, and
the masks that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np


@dataclass(frozen=True)
class AnswerToken:
    """One special token of an answer. ``level``: its name without brackets, "LOC" for [LOC]."""

    level: str

    @property
    def text(self) -> str:
        return f"[{self.level}]"


Answer = list[str | AnswerToken]  # an answer in pieces; plain text never becomes a token
Turn = tuple[str, Answer]  # (question, answer)


@dataclass
class Conversation:
    """Questions about one image. The image stands before the first question."""

    turns: list[Turn]
    """(question, answer) pairs in order; an answer is a list of texts and AnswerTokens."""
    masks: np.ndarray
    """bool (K, H, W), original frame: one per group of answer tokens, in their order; (0, H, W) for
    text only."""
    ignore: np.ndarray | None = None
    """bool (H, W): pixels that count neither in the loss nor in the metric."""
    host_masks: np.ndarray | None = None
    """bool (K, H, W): the object that holds each target, where the data know it."""
    is_sentence: bool | None = None
    """ReasonSeg's long (True) or short (False) query; None where the data do not say."""
    category: int | None = None
    """The number of the category that is asked for, of data in COCO's format."""


def answer_text(answer: Answer) -> str:
    """The answer as people read it: "It appears on [LOC]. It is [SEG]."."""
    return "".join(part.text if isinstance(part, AnswerToken) else part for part in answer)


def answer_from_ids(ids: Sequence[int], tokenizer, levels: Sequence[str]) -> Answer:
    """Generated token ids (L,) as an answer that can stand in the history of the next question."""
    level_tokens = {token_id(tokenizer, f"[{level}]"): AnswerToken(level) for level in levels}
    answer: Answer = []
    for is_level, group in groupby(ids, level_tokens.__contains__):
        if is_level:
            if answer and isinstance(text := answer[-1], str) and not text.endswith(" "):
                answer[-1] = text + " "
            answer += [level_tokens[index] for index in group]
        elif text := tokenizer.decode(list(group), skip_special_tokens=True):
            # Decoding drops the space between a special token and a following word.
            answer.append(text if not answer or text[0] in " .,;:!?" else " " + text)
    return answer


def text_from_ids(ids: Sequence[int], tokenizer, levels: Sequence[str]) -> str:
    """Generated token ids (L,) as people read them."""
    return answer_text(answer_from_ids(ids, tokenizer, levels)).strip()


def count_groups(turns: Sequence[Turn], levels: Sequence[str], where: str = "conversation") -> int:
    """The number of targets that the answers of ``turns`` name, one group of level tokens each.

    Raises ValueError if the tokens of an answer are not whole groups in the order of ``levels``.
    ``where`` names the sample.
    """
    groups = 0
    for _, answer in turns:
        found = [part.level for part in answer if isinstance(part, AnswerToken)]
        count = len(found) // len(levels)
        if found != list(levels) * count:
            raise ValueError(
                f"{where}: answer tokens {found} are not whole groups of the levels {list(levels)}"
            )
        groups += count
    return groups


def token_id(tokenizer, token: str) -> int:
    """The id of a token. Raises ValueError if the tokenizer does not have it."""
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or index == tokenizer.unk_token_id:
        raise ValueError(
            f"the tokenizer has no token {token}; add it before encoding (tokenizer.add_tokens)"
        )
    return index

"""Conversations as token ids, with labels that are exact by construction.

A sequence is written piece by piece; every piece is either a special token or a text, and either
supervised or not. Nothing is measured after the fact, so no tokenizer can shift the labels. Special
tokens are written by id only: whatever a text says, be it "[SEG]", "<image>" or "</s>", it is
tokenised as ordinary characters.

L is the number of tokens of a sequence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from dataset.conversation.templates import ConversationTemplate, get_template
from dataset.conversation.turns import (
    Answer,
    AnswerToken,
    Conversation,
    Turn,
    answer_text,
    token_id,
)

IGNORE_INDEX = -100  # the label that cross-entropy skips


# ----------------------------------------------------------------------------------------- encoding


@dataclass
class Encoded:
    """A sequence. ``labels`` equals ``input_ids`` where supervised and is -100 elsewhere; both have
    length L."""

    input_ids: list[int]
    labels: list[int]


_ANCHOR = "\n"  # no sentence-piece vocabulary merges a newline with what follows


class _Writer:
    """Collects pieces. Consecutive texts of equal supervision are tokenised together."""

    def __init__(
        self, tokenizer, template: ConversationTemplate, image_token: str, levels: Sequence[str]
    ):
        self.tokenizer = tokenizer
        self.strip = template.strip_at_tokens
        self.marks = [token_id(tokenizer, mark) for mark in template.image_marks or ()]
        self.image_id = token_id(tokenizer, image_token)
        self.level_ids = {level: token_id(tokenizer, f"[{level}]") for level in levels}
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-sequence token; generation could never stop"
            )
        # unknown words are ordinary text, every other special token is control
        control = {
            *tokenizer.all_special_ids,
            self.image_id,
            *self.marks,
            *self.level_ids.values(),
        } - {tokenizer.unk_token_id}
        self.control = {index: tokenizer.convert_ids_to_tokens(index) for index in control}
        self.ids: list[int] = []
        self.labels: list[int] = []
        self._text = ""
        self._supervised = False
        # nothing but the beginning-of-sequence token stands before the pending text
        self._at_start = True
        self._strip_next = False

    def text(self, text: str, supervised: bool = False) -> None:
        if supervised != self._supervised:
            self.flush()
            self._supervised = supervised
        self._text += text

    def token(self, index: int, supervised: bool = False, count: int = 1) -> None:
        # A space before a token would become a token of its own, which no published checkpoint has
        # seen.
        self._text = self._text.rstrip() if self.strip else self._text.rstrip(" ")
        self._token(index, supervised, count)

    def end(self, text: str, supervised: bool) -> None:
        """The end of an answer: ``text``, which must not merge with the last word, and the
        end-of-sequence token."""
        self._text = self._text.rstrip()
        self.flush()
        self.text(text, supervised)
        self._token(self.tokenizer.eos_token_id, supervised)

    def _token(self, index: int, supervised: bool = False, count: int = 1) -> None:
        self.flush()
        self._append([index] * count, supervised)
        self._at_start = self.strip or index == self.tokenizer.bos_token_id
        self._strip_next = self.strip and index != self.tokenizer.bos_token_id

    def image(self, count: int) -> None:
        before, after = (self.marks[:1], self.marks[1:]) if self.marks else ((), ())
        for index, repeat in (
            *((i, 1) for i in before),
            (self.image_id, count),
            *((i, 1) for i in after),
        ):
            self.token(index, count=repeat)

    def flush(self) -> None:
        if self._strip_next:
            self._text = self._text.lstrip()
        if self._text:
            self._append(self._tokenise(self._text), self._supervised)
            self._at_start = self._strip_next = False
        self._text = ""

    def _append(self, ids: list[int], supervised: bool) -> None:
        self.ids += ids
        self.labels += ids if supervised else [IGNORE_INDEX] * len(ids)

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]

    @cached_property
    def _anchor(self) -> list[int]:
        return self._plain(_ANCHOR)

    def _tokenise(self, text: str) -> list[int]:
        ids = self._continue(text)
        if self.control.keys() & ids:
            # split_special_tokens leaves added tokens whole that were not declared special, and a
            # word-level vocabulary may list them as words: a space inside makes ordinary text of
            # them.
            for index in self.control.keys() & ids:
                token = self.control[index]
                text = text.replace(token, f"{token[:1]} {token[1:]}")
            ids = self._continue(text)
            if found := self.control.keys() & ids:
                raise ValueError(
                    f"text {text!r} encodes to the special token {self.control[found.pop()]};"
                    " remove it from the text"
                )
        return ids

    def _continue(self, text: str) -> list[int]:
        """Token ids of ``text`` after what is written, without the space that sentence-piece models
        put before it."""
        if self._at_start:  # the slow tokenizer put its space before a space, too
            return self._plain(f" {text}" if self.strip and text.startswith(" ") else text)
        anchor, ids = self._anchor, self._plain(_ANCHOR + text)
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else self._plain(text)


def _write_question(
    writer: _Writer,
    template: ConversationTemplate,
    question: str,
    index: int,
    image_token_count: int,
) -> None:
    """Turn ``index`` of the sequence up to where the assistant speaks; the image is left out if its
    count is 0."""
    bos = writer.tokenizer.bos_token_id
    if bos is not None and (index == 0 or template.bos_every_turn):
        writer.token(bos)
    writer.text(template.before(index))
    if image_token_count:
        writer.image(image_token_count)
        writer.text(template.image_gap)
    writer.text(question.strip() + template.assistant)
    writer.flush()


def _write_answer(
    writer: _Writer, template: ConversationTemplate, reply: Answer, supervised: bool
) -> None:
    if not answer_text(reply).strip():
        raise ValueError("an answer is empty; every turn needs one")
    for position, part in enumerate(reply):
        if isinstance(part, AnswerToken):
            if part.level not in writer.level_ids:
                raise ValueError(
                    f"answer token {part.text} is not one of the levels {list(writer.level_ids)}"
                )
            writer.token(writer.level_ids[part.level], supervised)
        else:
            writer.text(part if position else " " + part.lstrip(), supervised)
    writer.end(template.answer_end, supervised)


def _write_turns(
    writer: _Writer,
    template: ConversationTemplate,
    exemplars: Sequence[tuple[str, str]],
    turns: Sequence[Turn],
    image_token_count: int,
    supervised: bool,
) -> None:
    for index, (question, reply) in enumerate(exemplars):
        _write_question(writer, template, question, index, 0)
        _write_answer(writer, template, [reply], supervised=False)
    for index, (question, reply) in enumerate(turns):
        _write_question(
            writer, template, question, len(exemplars) + index, 0 if index else image_token_count
        )
        _write_answer(writer, template, reply, supervised)


def encode(
    conversation: Conversation,
    exemplars: Sequence[tuple[str, str]],
    tokenizer,
    template: str | ConversationTemplate,
    image_token: str,
    image_token_count: int,
    levels: Sequence[str],
) -> Encoded:
    """The token ids and labels of a conversation: exemplar turns, then the image and the
    conversation's own turns.

    Supervised are the conversation's answers with their end tokens, nothing else. ``image_token``
    is repeated ``image_token_count`` times before the first question, as transformers' LLaVA
    expects it. Raises ValueError for an answer without text, a token that is not one of ``levels``
    and a tokenizer that lacks one.
    """
    template = get_template(template)
    writer = _Writer(tokenizer, template, image_token, levels)
    _write_turns(
        writer, template, exemplars, conversation.turns, image_token_count, supervised=True
    )
    return Encoded(writer.ids, writer.labels)


def encode_prompt(
    question: str,
    history: Sequence[Turn],
    exemplars: Sequence[tuple[str, str]],
    tokenizer,
    template: str | ConversationTemplate,
    image_token: str,
    image_token_count: int,
    levels: Sequence[str],
) -> list[int]:
    """The token ids (L,) that ask ``question`` after ``history``; they end where the assistant
    starts to speak.

    They are exactly the first ids of ``encode`` for the same turns.
    """
    template = get_template(template)
    writer = _Writer(tokenizer, template, image_token, levels)
    _write_turns(writer, template, exemplars, history, image_token_count, supervised=False)
    index = len(exemplars) + len(history)
    _write_question(writer, template, question, index, 0 if history else image_token_count)
    return writer.ids


def encode_text(
    text: str,
    tokenizer,
    template: str | ConversationTemplate,
    image_token: str,
    levels: Sequence[str],
) -> list[int]:
    """The token ids (L,) of a text in which special tokens are written out: trusted text only, such
    as recorded prompts.

    It starts with the beginning-of-sequence token, where the tokenizer has one.
    """
    template = get_template(template)
    writer = _Writer(tokenizer, template, image_token, levels)
    tokens = {token: index for index, token in writer.control.items()}
    if tokenizer.bos_token_id is not None:
        writer.token(tokenizer.bos_token_id)
    for part in re.split(f"({'|'.join(map(re.escape, tokens))})", text):
        if part in tokens:
            writer.token(tokens[part])
        elif part:
            writer.text(part)
    writer.flush()
    return writer.ids

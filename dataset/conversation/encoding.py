"""Conversations as token ids, with labels that are exact by construction.

A sequence is written piece by piece; every piece is either a special token or a text, and either
supervised or not. Nothing is measured after the fact, so no tokenizer can shift the labels. Special
tokens are written by id only: whatever a text says, be it "[SEG]", "<image>" or "</s>", it is
tokenised as ordinary characters.

L is the number of tokens of a sequence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cores.dataset.conversation.templates import ConversationTemplate, get_template
from cores.dataset.conversation.turns import (
    Answer,
    Conversation,
    Turn,
    answer_text,
    token_id,
)

IGNORE_INDEX = -100  # the label that cross-entropy skips
_ANCHOR = "\n"  # no sentence-piece vocabulary merges a newline with what follows


@dataclass
class Encoded:
    """A sequence. ``labels`` equals ``input_ids`` where supervised and is -100 elsewhere; both have
    length L."""

    input_ids: list[int]
    labels: list[int]


class _SequenceWriter:
    r"""Writes one sequence. Consecutive texts of equal supervision are tokenised together.

    White space is the difficulty. LLaMA's tokenizer puts a space, "▁", before every text that it is
    given, but most texts continue the sequence after a special token and start nothing. Such a text
    is tokenised behind a newline (``_ANCHOR``), and the tokens of that newline are cut off again.
    "<image>\nWhere? ASSISTANT: It is [SEG]. Yes." is written like this::

        piece                   given to the tokenizer      kept
        <image>                                             <image>
        "\nWhere? ASSISTANT:"   "\n\nWhere? ASSISTANT:"     <0x0A> Where ? ▁A SS IST ANT :
        " It is "               "\n It is"                  ▁It ▁is
        [SEG]                                               [SEG]
        ". Yes."                "\n. Yes."                  . ▁Yes .

    The space before [SEG] is dropped, because it would become a lone "▁" that no published
    checkpoint has seen there.

    The checkpoints of LLaVA v1, LISA and CoReS were trained with transformers' *slow* LLaMA
    tokenizer, which drops all white space next to a token and takes the text after it for a new
    one. With ``strip_at_tokens`` a newline therefore vanishes, and two spaces appear::

        "\nWhere? ASSISTANT:"   "Where? ASSISTANT:"         ▁Where ? ▁A SS IST ANT :
        ". Yes."                ". Yes."                    ▁. ▁Yes .
    """

    def __init__(
        self, tokenizer, template: ConversationTemplate, image_token: str, levels: Sequence[str]
    ):
        self.tokenizer, self.template = tokenizer, template
        self.strip = template.strip_at_tokens
        self.marks = [token_id(tokenizer, mark) for mark in template.image_marks or ()]
        self.image_id = token_id(tokenizer, image_token)
        self.level_ids = {level: token_id(tokenizer, f"[{level}]") for level in levels}
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-sequence token; generation could never stop"
            )
        special = {*tokenizer.all_special_ids, self.image_id, *self.marks, *self.level_ids.values()}
        special -= {tokenizer.unk_token_id}  # an unknown word is ordinary text
        # The ids that a text must never become, and their tokens.
        self.control = {index: tokenizer.convert_ids_to_tokens(index) for index in special}
        self.anchor = self._plain(_ANCHOR)
        self.ids: list[int] = []
        self.labels: list[int] = []
        self._text = ""  # not yet tokenised
        self._supervised = False
        self._at_start = True  # the next text is tokenised as the beginning of a text
        self._strip_next = False  # the next text loses its leading white space

    def text(self, text: str, supervised: bool = False) -> None:
        if supervised != self._supervised:
            self.flush()
            self._supervised = supervised
        self._text += text

    def token(self, index: int, supervised: bool = False) -> None:
        """Writes a special token, and drops white space before it."""
        self._text = self._text.rstrip() if self.strip else self._text.rstrip(" ")
        self._token(index, supervised)

    def _token(self, index: int, supervised: bool) -> None:
        self.flush()
        self._append([index], supervised)
        self._at_start = self.strip or index == self.tokenizer.bos_token_id
        self._strip_next = self.strip and index != self.tokenizer.bos_token_id

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

    def _tokenise(self, text: str) -> list[int]:
        ids = self._continue(text)
        if self.control.keys() & ids:
            # split_special_tokens leaves added tokens whole that were not declared special, and a
            # word-level vocabulary may list control tokens as words: a space inside makes ordinary
            # text of them.
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
        if self._at_start:
            # The slow tokenizer put its space before every text; the fast one leaves it out where
            # the text has one already, so " USER" would lack a "▁".
            return self._plain(f" {text}" if self.strip and text.startswith(" ") else text)
        count, ids = len(self.anchor), self._plain(_ANCHOR + text)
        # A vocabulary without a newline (of words, for example) puts no space before a text either.
        return ids[count:] if ids[:count] == self.anchor else self._plain(text)

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]

    def question(self, question: str, index: int, image_token_count: int) -> None:
        """Writes turn ``index`` of the sequence up to the prompt's end; the image is left out if
        its count is 0."""
        bos = self.tokenizer.bos_token_id
        if bos is not None and (index == 0 or self.template.bos_every_turn):
            self.token(bos)
        self.text(self.template.before(index))
        if image_token_count:
            image = [self.image_id] * image_token_count
            for token in (*self.marks[:1], *image, *self.marks[1:]):
                self.token(token)
            self.text(self.template.image_gap)
        self.text(question.strip() + self.template.assistant)
        self.flush()

    def answer(self, answer: Answer, supervised: bool) -> None:
        """Writes an answer with the template's end and the end-of-sequence token."""
        if not answer_text(answer).strip():
            raise ValueError("an answer is empty; every turn needs one")
        for position, part in enumerate(answer):
            if isinstance(part, str):
                self.text(part if position else " " + part.lstrip(), supervised)
            elif part.level in self.level_ids:
                self.token(self.level_ids[part.level], supervised)
            else:
                raise ValueError(
                    f"answer token {part.text} is not one of the levels {list(self.level_ids)}"
                )
        self._text = self._text.rstrip()
        self.flush()  # the template's end must not merge with the last word
        self.text(self.template.answer_end, supervised)
        self._token(self.tokenizer.eos_token_id, supervised)

    def turns(
        self,
        exemplars: Sequence[tuple[str, str]],
        turns: Iterable[tuple[str, Answer | None]],
        image_token_count: int,
        supervised: bool,
    ) -> None:
        """Writes exemplars and turns. An answer that is None is still to be generated: the sequence
        ends where it begins."""
        for index, (question, text) in enumerate(exemplars):
            self.question(question, index, 0)
            self.answer([text], supervised=False)
        first = len(exemplars)
        for index, (question, answer) in enumerate(turns, start=first):
            self.question(question, index, image_token_count if index == first else 0)
            if answer is not None:
                self.answer(answer, supervised)


def encode_conversation(
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
    writer = _SequenceWriter(tokenizer, get_template(template), image_token, levels)
    writer.turns(exemplars, conversation.turns, image_token_count, supervised=True)
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
    """The token ids (L,) that ask ``question`` after ``history``; they end where the answer begins.

    They are exactly the first ids of ``encode_conversation`` for the same turns.
    """
    writer = _SequenceWriter(tokenizer, get_template(template), image_token, levels)
    turns = [*history, (question, None)]
    writer.turns(exemplars, turns, image_token_count, supervised=False)
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
    writer = _SequenceWriter(tokenizer, get_template(template), image_token, levels)
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

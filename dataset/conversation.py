"""Conversations as token ids, with labels that are exact by construction.

A sequence is written piece by piece; every piece is either a special token or a text, and either supervised or not.
Nothing is measured after the fact, so no tokenizer can shift the labels. Special tokens are written by id only:
whatever a text says, be it "[SEG]", "<image>" or "</s>", it is tokenised as ordinary characters.

L is the number of tokens of a sequence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

IGNORE_INDEX = -100  # the label that cross-entropy skips


@dataclass(frozen=True)
class AnswerToken:
    """One special token of an answer. ``level``: its name without brackets, "LOC" for [LOC]."""

    level: str

    @property
    def text(self) -> str:
        return f"[{self.level}]"


Answer = list[str | AnswerToken]  # an answer in pieces; plain text never becomes a token
Turn = tuple[str, Answer]  # (question, answer)


def answer_text(answer: Answer) -> str:
    """The answer as people read it: "It appears on [LOC]. It is [SEG]."."""
    return "".join(part.text if isinstance(part, AnswerToken) else part for part in answer)


def answer_from_ids(ids: Sequence[int], tokenizer, levels: Sequence[str]) -> Answer:
    """What the model said, token ids (L,), as an answer that can stand in the history of the next question."""
    by_id = {_token_id(tokenizer, f"[{level}]"): AnswerToken(level) for level in levels}
    answer: Answer = []
    pending: list[int] = []
    for token in [*ids, None]:
        if token is not None and token not in by_id:
            pending.append(token)
            continue
        text = tokenizer.decode(pending, skip_special_tokens=True) if pending else ""
        if text:
            answer.append(text if not answer or text[0] in " .,;:!?" else " " + text)
        pending = []
        if token is not None:
            if isinstance(answer[-1] if answer else None, str) and not answer[-1].endswith(" "):
                answer[-1] += " "
            answer.append(by_id[token])
    return answer


def text_from_ids(ids: Sequence[int], tokenizer, levels: Sequence[str]) -> str:
    """Generated ids (L,) as people read them."""
    return answer_text(answer_from_ids(ids, tokenizer, levels)).strip()


@dataclass
class Conversation:
    """Questions about one image. The image stands before the first question."""

    turns: list[Turn]
    """(question, answer) pairs in order; an answer is a list of texts and AnswerTokens."""
    masks: np.ndarray
    """bool (K, H, W), original frame: one per group of answer tokens, in their order; (0, H, W) for text only."""
    ignore: np.ndarray | None = None
    """bool (H, W): pixels that count neither in the loss nor in the metric."""
    host_masks: np.ndarray | None = None
    """bool (K, H, W): the object that holds each target, where the data know it."""
    is_sentence: bool | None = None
    """ReasonSeg's long (True) or short (False) query; None where the data do not say."""


# ------------------------------------------------------------------------------------------------------------ templates


@dataclass(frozen=True)
class ConversationTemplate:
    """How turns are written. Every answer ends with the end-of-sequence token, so generation always stops by id.

    What belongs to a checkpoint rather than to a style comes last; ``CoresProcessor.conversation`` sets it.
    """

    name: str
    system: str
    opening: str  # before the first question of the sequence, with {system} in it
    user: str  # before every later question
    assistant: str  # between a question and its answer
    image_gap: str  # between the image and the question
    answer_end: str = ""  # after an answer, before the end-of-sequence token
    bos_every_turn: bool = False
    image_marks: tuple[str, str] | None = None  # tokens around the image, such as ("<im_start>", "<im_end>")
    strip_at_tokens: bool = False
    """No white space next to a token, and text after one starts like the first text of a sequence: what transformers'
    slow LLaMA tokenizer made of every sequence that the checkpoints of LLaVA v1, LISA and CoReS were trained on."""

    def before(self, index: int) -> str:
        """What stands before question ``index`` of a sequence, counted from 0."""
        return self.user if index else self.opening.replace("{system}", self.system)

    def chat_template(self, image_token: str, space_first: bool = True) -> str:
        """The same format as a Jinja template of transformers' ``apply_chat_template``, one ``image_token`` per image.

        Answers and their end are inside ``{% generation %}``, so that ``return_assistant_tokens_mask`` gives the labels.
        A first message of the role "system" replaces the system text. ``space_first``: whether the tokenizer puts a space
        before a text, as LLaMA's does. White space next to a token is the tokenizer's part (``model.llava.set_spaces``).
        """
        start, end = self.image_marks or ("", "")
        words = {
            "SYSTEM": self.system,
            "OPENING": self.opening,
            "USER": self.user,
            "ASSISTANT": self.assistant,
            "IMAGE": start + image_token + end,
            "IMAGE_GAP": self.image_gap,
            "ANSWER_END": self.answer_end,
            "SPACE": " " if space_first else "",
            "BOS_EVERY_TURN": self.bos_every_turn,
            "STRIP": self.strip_at_tokens,
        }
        fill = lambda found: json.dumps(words[found[1]], ensure_ascii=False)  # noqa: E731
        return re.sub(rf"<<({'|'.join(words)})>>", fill, _CHAT_TEMPLATE)


_CHAT_TEMPLATE = """
{%- macro text_of(content) -%}
  {%- if content is string -%}{{- content -}}
  {%- else -%}{%- for part in content if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = text_of(messages[0]['content']) -%}{%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = <<SYSTEM>> -%}{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
  {%- if message['role'] == 'user' -%}
    {%- set before = <<OPENING>>.replace('{system}', system) if loop.first else <<USER>> -%}
    {%- if loop.first or <<BOS_EVERY_TURN>> -%}
      {{- bos_token -}}
      {%- if <<STRIP>> or not before.startswith(' ') -%}{{- <<SPACE>> -}}{%- endif -%}
    {%- endif -%}
    {%- set images = [] if message['content'] is string else message['content'] | selectattr('type', 'equalto', 'image') | list -%}
    {{- before.rstrip(' ') if images else before -}}
    {%- for image in images -%}{{- <<IMAGE>> + <<IMAGE_GAP>> -}}{%- endfor -%}
    {{- text_of(message['content']) | trim + <<ASSISTANT>> -}}
  {%- else -%}
    {{- ' ' -}}
    {%- generation -%}{{- text_of(message['content']) | trim + <<ANSWER_END>> + eos_token -}}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}"""


_USER_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_HUMAN_SYSTEM = _USER_SYSTEM.replace("curious user", "curious human").replace("user's", "human's")
_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

TEMPLATES: dict[str, ConversationTemplate] = {
    template.name: template
    for template in (
        ConversationTemplate("llava_v1", _HUMAN_SYSTEM, "{system} USER: ", "USER: ", " ASSISTANT:", "\n"),
        ConversationTemplate("vicuna_v1", _USER_SYSTEM, "{system} USER: ", "USER: ", " ASSISTANT:", "\n"),
        ConversationTemplate("llava_v0", _HUMAN_SYSTEM, "{system}###Human: ", "Human: ", "###Assistant:", "\n", answer_end="###"),
        ConversationTemplate(
            "llava_llama_2",
            _LLAMA_2_SYSTEM,
            "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
            "[INST] ",
            " [/INST]",
            "\n",
            answer_end=" ",
            bos_every_turn=True,
        ),
        ConversationTemplate("tiny", "", "USER: ", "USER: ", " ASSISTANT:", " "),
    )
}


def get_template(name: str | ConversationTemplate) -> ConversationTemplate:
    """The template of that name; a template is returned as it is. Raises ValueError that lists the known names."""
    if isinstance(name, ConversationTemplate):
        return name
    if name not in TEMPLATES:
        raise ValueError(f"unknown conversation template {name!r}; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


# ------------------------------------------------------------------------------------------------------------- wordings

# {where} stands for the tokens before the last one, {last} for the last one. The first wording of each list is the
# canonical one of teacher-forced evaluation.
ONE_LEVEL_WORDINGS = (
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
    f"{first} {last}" for last in ("It is {last}.", "The segmentation result is {last}.") for first in _APPEARS
)
_ONE_LEVEL_NEXT = " Another is {last}."
_MULTI_LEVEL_NEXT = " Another appears on {where}. It is {last}."

SENTENCE_QUESTIONS = ("{text} Please output segmentation mask.", "{text} Please respond with segmentation mask.")
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


def sentence_question(text: str, rng: np.random.Generator | None = None) -> str:
    """The question for a query that is a whole sentence. ``rng`` None gives the canonical wording."""
    return _pick(SENTENCE_QUESTIONS, rng).format(text=text)


def phrase_question(phrase: str, rng: np.random.Generator | None = None) -> str:
    """The question for a phrase such as "the dog". ``rng`` None gives the canonical wording."""
    return _pick(PHRASE_QUESTIONS, rng).format(text=phrase)


def explain_question(text: str, rng: np.random.Generator | None = None) -> str:
    """The question for a query that also asks for the reason."""
    return f"{text} {_pick(EXPLAIN_SUFFIXES, rng)}"


def _fill(wording: str, levels: Sequence[str]) -> Answer:
    """One wording with the tokens of one target in it; levels between the first and the last read "at [PART]"."""
    where: Answer = []
    for level in levels[:-1]:
        where += [", at ", AnswerToken(level)] if where else [AnswerToken(level)]
    pieces = {"{where}": where, "{last}": [AnswerToken(levels[-1])]}
    return [piece for text in re.split(r"(\{where\}|\{last\})", wording) if text for piece in pieces.get(text, [text])]


def answer(
    levels: Sequence[str], rng: np.random.Generator | None = None, explanation: str | None = None, targets: int = 1
) -> Answer:
    """An answer with one group of ``levels`` tokens per target.

    ``rng`` draws the wording (None: the canonical one); ``explanation`` is appended after the tokens.
    """
    if not levels:
        raise ValueError('levels is empty; give at least one answer token, for example ["SEG"]')
    if targets < 1:
        raise ValueError(f"an answer with tokens needs at least one target, got {targets}; text-only answers are plain text")
    wordings, following = (MULTI_LEVEL_WORDINGS, _MULTI_LEVEL_NEXT) if len(levels) > 1 else (ONE_LEVEL_WORDINGS, _ONE_LEVEL_NEXT)
    parts = _fill(_pick(wordings, rng), levels)
    for _ in range(targets - 1):
        parts += _fill(following, levels)
    if explanation:
        parts.append(" " + explanation.strip())
    return parts


def count_groups(turns: Sequence[Turn], levels: Sequence[str], where: str = "conversation") -> int:
    """The number of targets that the answers of ``turns`` name, one group of level tokens each.

    Raises ValueError if the tokens of an answer are not whole groups in the order of ``levels``. ``where`` names the
    sample.
    """
    groups = 0
    for _, reply in turns:
        found = [part.level for part in reply if isinstance(part, AnswerToken)]
        count = len(found) // len(levels)
        if found != list(levels) * count:
            raise ValueError(f"{where}: answer tokens {found} are not whole groups of the levels {list(levels)}")
        groups += count
    return groups


# ------------------------------------------------------------------------------------------------------------- encoding


@dataclass
class Encoded:
    """A sequence. ``labels`` equals ``input_ids`` where supervised and is -100 elsewhere; both have length L."""

    input_ids: list[int]
    labels: list[int]


def _token_id(tokenizer, token: str) -> int:
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or index == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no token {token}; add it before encoding (tokenizer.add_tokens)")
    return index


_ANCHOR = "\n"  # no sentence-piece vocabulary merges a newline with what follows


class _Writer:
    """Collects pieces. Consecutive texts of equal supervision are tokenised together."""

    def __init__(self, tokenizer, template: ConversationTemplate, image_token: str, levels: Sequence[str]):
        self.tokenizer = tokenizer
        self.strip = template.strip_at_tokens
        self.marks = [_token_id(tokenizer, mark) for mark in template.image_marks or ()]
        self.image_id = _token_id(tokenizer, image_token)
        self.level_ids = {level: _token_id(tokenizer, f"[{level}]") for level in levels}
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token; generation could never stop")
        # unknown words are ordinary text, every other special token is control
        control = {*tokenizer.all_special_ids, self.image_id, *self.marks, *self.level_ids.values()} - {tokenizer.unk_token_id}
        self.control = {index: tokenizer.convert_ids_to_tokens(index) for index in control}
        self.ids: list[int] = []
        self.labels: list[int] = []
        self._text = ""
        self._supervised = False
        self._at_start = True  # nothing but the beginning-of-sequence token stands before the pending text
        self._strip_next = False

    def text(self, text: str, supervised: bool = False) -> None:
        if supervised != self._supervised:
            self.flush()
            self._supervised = supervised
        self._text += text

    def token(self, index: int, supervised: bool = False, count: int = 1) -> None:
        # A space before a token would become a token of its own, which no published checkpoint has seen.
        self._text = self._text.rstrip() if self.strip else self._text.rstrip(" ")
        self._token(index, supervised, count)

    def end(self, text: str, supervised: bool) -> None:
        """The end of an answer: ``text``, which must not merge with the last word, and the end-of-sequence token."""
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
        for index, repeat in (*((i, 1) for i in before), (self.image_id, count), *((i, 1) for i in after)):
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
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    @cached_property
    def _anchor(self) -> list[int]:
        return self._plain(_ANCHOR)

    def _tokenise(self, text: str) -> list[int]:
        ids = self._continue(text)
        if self.control.keys() & ids:
            # split_special_tokens leaves added tokens whole that were not declared special, and a word-level vocabulary
            # may list them as words: a space inside makes ordinary text of them.
            for index in self.control.keys() & ids:
                token = self.control[index]
                text = text.replace(token, f"{token[:1]} {token[1:]}")
            ids = self._continue(text)
            if found := self.control.keys() & ids:
                raise ValueError(f"text {text!r} encodes to the special token {self.control[found.pop()]}; remove it from the text")
        return ids

    def _continue(self, text: str) -> list[int]:
        """Token ids of ``text`` after what is written, without the space that sentence-piece models put before it."""
        if self._at_start:  # the slow tokenizer put its space before a space, too
            return self._plain(f" {text}" if self.strip and text.startswith(" ") else text)
        anchor, ids = self._anchor, self._plain(_ANCHOR + text)
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else self._plain(text)


def _write_question(writer: _Writer, template: ConversationTemplate, question: str, index: int, image_token_count: int) -> None:
    """Turn ``index`` of the sequence up to where the assistant speaks; the image is left out if its count is 0."""
    bos = writer.tokenizer.bos_token_id
    if bos is not None and (index == 0 or template.bos_every_turn):
        writer.token(bos)
    writer.text(template.before(index))
    if image_token_count:
        writer.image(image_token_count)
        writer.text(template.image_gap)
    writer.text(question.strip() + template.assistant)
    writer.flush()


def _write_answer(writer: _Writer, template: ConversationTemplate, reply: Answer, supervised: bool) -> None:
    if not answer_text(reply).strip():
        raise ValueError("an answer is empty; every turn needs one")
    for position, part in enumerate(reply):
        if isinstance(part, AnswerToken):
            if part.level not in writer.level_ids:
                raise ValueError(f"answer token {part.text} is not one of the levels {list(writer.level_ids)}")
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
        _write_question(writer, template, question, len(exemplars) + index, 0 if index else image_token_count)
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
    """The token ids and labels of a conversation: exemplar turns, then the image and the conversation's own turns.

    Supervised are the conversation's answers with their end tokens, nothing else. ``image_token`` is repeated
    ``image_token_count`` times before the first question, as transformers' LLaVA expects it. Raises ValueError for an
    answer without text, a token that is not one of ``levels`` and a tokenizer that lacks one.
    """
    template = get_template(template)
    writer = _Writer(tokenizer, template, image_token, levels)
    _write_turns(writer, template, exemplars, conversation.turns, image_token_count, supervised=True)
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
    """The token ids (L,) that ask ``question`` after ``history``; they end where the assistant starts to speak.

    They are exactly the first ids of ``encode`` for the same turns.
    """
    template = get_template(template)
    writer = _Writer(tokenizer, template, image_token, levels)
    _write_turns(writer, template, exemplars, history, image_token_count, supervised=False)
    index = len(exemplars) + len(history)
    _write_question(writer, template, question, index, 0 if history else image_token_count)
    return writer.ids


def encode_text(text: str, tokenizer, template: str | ConversationTemplate, image_token: str, levels: Sequence[str]) -> list[int]:
    """The token ids (L,) of a text in which special tokens are written out: trusted text only, such as recorded prompts.

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

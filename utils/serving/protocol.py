"""OpenAI's chat completions as this server reads and writes them.

A request is a conversation about one picture: the first message of the user brings it, the further
ones are follow-up questions, and answers stand between them with their tokens written out. What the
model cannot do is refused by the name of the field, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cores.dataset.conversation.turns import (
    Answer,
    AnswerToken,
    Turn,
    answer_from_ids,
    answer_text,
    token_id,
)
from cores.model.inference.inputs import clean_question
from cores.model.inference.results import Result
from cores.model.masks import complete_groups
from cores.model.reasoning.generation import Decoding

# Of one conversation: what does not fit into the model is forgotten turn by turn, which takes time.
MOST_MESSAGES = 200
MOST_CHARACTERS = 2**16
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
NO_GROUP = "not part of a whole group, one token of every level from coarse to fine"
EMPTY = "the mask is empty"


class Refused(Exception):
    """A request that is answered with an error in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str = ""):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_dict(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = KINDS.get(self.status, kind)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code or None}
        return {"error": error}


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Form):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextFormat(_Form):
    type: Literal["text"]


class ChatRequest(_Form):
    """Fields with one value only are those that clients send whether they matter or not."""

    model: str
    messages: list[Any] = Field(min_length=1, max_length=MOST_MESSAGES)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    """None and 0: the likeliest token."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: Literal[1] | None = None
    user: str | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, fields: Any) -> Any:
        """Many clients write null for what they do not ask for."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


@dataclass
class Question:
    """A request that was read; its picture was not."""

    address: str
    """Of the picture: data:… or http(s)://…"""
    place: str
    """Where in the request the picture is, for messages."""
    history: list[Turn]
    text: str
    model: str
    stream: bool
    include_usage: bool
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None

    def decoding(self, most_tokens: int) -> Decoding:
        """How it is answered; ``most_tokens``: of any answer."""
        tokens = min(self.max_tokens or most_tokens, most_tokens)
        if not self.temperature:
            return Decoding(tokens)
        return Decoding(tokens, do_sample=True, temperature=self.temperature, top_p=self.top_p)


def read_request(body: bytes, levels: Sequence[str]) -> Question:
    """``body``: JSON of a ChatRequest; ``levels``: names of the answer tokens. Raises Refused,
    which names the field."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place, said = _place(first["loc"]), first["msg"]
        if first["type"] == "json_invalid":
            raise Refused(400, f"the body is no JSON: {said}", code="invalid_json") from None
        if first["type"] == "extra_forbidden":
            known = ", ".join(ChatRequest.model_fields) if "." not in place else "others"
            said = f"not supported by this server, which takes {known}"
        if first["type"] == "literal_error":
            said = f"not supported by this server ({said[0].lower()}{said[1:]})"
        raise Refused(422, f"{place}: {said}", place, "unsupported_value") from None
    if request.top_p not in (None, 1) and not request.temperature:
        raise Refused(422, "top_p: acts with a temperature above 0 only", "top_p")
    if request.temperature and request.temperature < 0.01:
        raise Refused(422, "temperature: must be 0 or at least 0.01", "temperature")
    turns, address, place = _conversation(request.messages, levels)
    history = [(question, answer) for question, answer in turns[:-1] if answer]
    limits = request.max_tokens, request.max_completion_tokens
    return Question(
        address,
        place,
        history,
        turns[-1][0],
        request.model,
        bool(request.stream),
        bool(request.stream_options and request.stream_options.include_usage),
        min(filter(None, limits), default=None),
        request.temperature or 0.0,
        request.top_p or 1.0,
        request.seed,
    )


def _place(location: Sequence[int | str]) -> str:
    """("messages", 0, "role") as "messages[0].role"."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".") or "the body"


def _conversation(
    messages: list[Any], levels: Sequence[str]
) -> tuple[list[tuple[str, Answer | None]], str, str]:
    """(question, answer) pairs, of which the last has no answer; the picture's address, and its
    place in the request."""
    turns: list[tuple[str, Answer | None]] = []
    pictures: list[tuple[str, str]] = []
    characters = 0
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant"):
            what = f"the role {role!r:.40} is not supported; user and assistant are"
            raise Refused(422, f"{where}: {what}", f"{where}.role", "unsupported_value")
        if (role == "user") != (number % 2 == 0):
            what = "user and assistant take turns, the user first"
            raise Refused(422, f"{where}: {what}", f"{where}.role")
        text, found = _content(message, role, where)
        characters += len(text)
        if characters > MOST_CHARACTERS:
            what = f"a conversation of more than {MOST_CHARACTERS} characters is too long"
            raise Refused(422, f"{where}: {what}", where, "context_length_exceeded")
        if role == "assistant":
            turns[-1] = turns[-1][0], answer_from_text(text, levels)
            continue
        try:
            turns.append((clean_question(text), None))
        except ValueError as error:
            raise Refused(422, f"{where}: {error}", where) from None
        pictures += found
        if found and (number or len(pictures) > 1):
            place = found[-1][1]
            what = "a conversation is about one picture, which its first message brings"
            raise Refused(422, f"{place}: {what}; start another one for another", place)
    if turns[-1][1] is not None:
        raise Refused(422, "messages: the last one must be a question of the user", "messages")
    if not pictures:
        what = 'has no picture; add {"type": "image_url", "image_url": {"url": "data:…"}}'
        raise Refused(422, f"messages[0]: {what}", "messages[0].content")
    return turns, *pictures[0]


def _content(message: dict[str, Any], role: str, where: str) -> tuple[str, list[tuple[str, str]]]:
    """The text of a message, and (address, place) of its pictures. An answer of ours may come back
    as it was sent: its masks are not needed."""
    unknown = message.keys() - {"role", "content", "name"} if role == "user" else set()
    if role == "assistant":
        needed = ("tool_calls", "function_call", "audio", "refusal")
        unknown = {name for name in needed if message.get(name)}
    if unknown:
        name = min(unknown)
        raise Refused(422, f"{where}.{name}: not supported by this server", f"{where}.{name}")
    content = message.get("content")
    if isinstance(content, str):
        return content, []
    if content is None and role == "assistant":
        return "", []
    if not isinstance(content, list):
        what = "must be a text or a list of parts"
        raise Refused(422, f"{where}.content: {what}", f"{where}.content")
    texts, pictures = [], []
    for index, part in enumerate(content):
        place = f"{where}.content[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and role == "user":
            url = part.get("image_url")
            address = url.get("url") if isinstance(url, dict) else None
            if not isinstance(address, str):
                raise Refused(422, f'{place}.image_url: must be {{"url": text}}', place)
            pictures.append((address, place))
        else:
            what = "text and image_url are" if role == "user" else "text is"
            said = f"a part of type {kind!r:.40} is not supported here; {what}"
            raise Refused(422, f"{place}: {said}", place, "unsupported_value")
    return " ".join(texts), pictures


def answer_from_text(text: str, levels: Sequence[str]) -> Answer:
    """An answer as it was sent, in pieces, with its tokens as tokens again; empty for one without
    words, which is not remembered."""
    pattern = "|".join(re.escape(f"[{level}]") for level in levels)
    pieces = re.split(f"({pattern})", text.strip())
    tokens = {f"[{level}]": AnswerToken(level) for level in levels}
    return [tokens.get(piece, piece) for piece in pieces if piece]


# ------------------------------------------------------------------------------------- answers


def masks(result: Result, tokenizer: Any, levels: Sequence[str]) -> list[dict[str, Any]]:
    """One entry for each answer token, in the order of the text.

    "token": "[SEG]"; "position": of its first character in the text, in characters; "level": "SEG";
    "group": number of the group of tokens that it belongs to, from 0, or None; "rle": COCO's
    compressed run lengths in the picture's own size; "area": pixels; "predicted_iou": SAM's
    estimate; "bbox": COCO's [x, y, width, height]; "reason": why there is no mask, or why it is
    empty. All five are None where they are not known.
    """
    parts = answer_from_ids(result.token_ids, tokenizer, levels)
    whole = answer_text(parts)
    place = len(whole.lstrip()) - len(whole)
    ids = [token_id(tokenizer, f"[{level}]") for level in levels]
    groups = complete_groups(result.token_ids, ids)
    group_of = {at: number for number, group in enumerate(groups) for at in group}
    at_levels = (at for at, index in enumerate(result.token_ids) if index in ids)
    rows = []
    for part in parts:
        if isinstance(part, AnswerToken):
            group = group_of.get(next(at_levels))
            row = {"token": part.text, "position": place, "level": part.level, "group": group}
            rows.append(row | _mask(None if group is None else result.masks[group], part.level))
        place += len(part.text if isinstance(part, AnswerToken) else part)
    return rows


def _mask(found: Any, level: str) -> dict[str, Any]:
    """``found``: the AnswerMask of a group, or None."""
    if found is None:
        names = "rle", "area", "predicted_iou", "bbox"
        return {name: None for name in names} | {"reason": NO_GROUP}
    one = type(found)({level: found.levels[level]}, {level: found.ious[level]})
    x0, y0, x1, y1 = one.box or (0, 0, 0, 0)
    return {
        "rle": one.rle,
        "area": one.area,
        "predicted_iou": round(one.predicted_iou, 4),
        "bbox": [x0, y0, x1 - x0, y1 - y0] if one.area else None,
        "reason": None if one.area else EMPTY,
    }


@dataclass
class Answered:
    """A whole answer, ready to be written: the server's ``identity`` of it (id, created, model),
    and what the Result does not know."""

    identity: dict[str, Any]
    result: Result
    masks: list[dict[str, Any]]
    prompt_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        completion = len(self.result.token_ids) + self.result.finished  # the end token
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }

    @property
    def _ours(self) -> dict[str, Any]:
        """What OpenAI's messages do not have."""
        return {
            "masks": self.masks,
            "why_no_mask": self.result.why_no_mask,
            "forgotten_turns": self.result.forgotten_turns,
        }

    @property
    def _end(self) -> str:
        return "stop" if self.result.finished else "length"

    def completion(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.result.text, "refusal": None, **self._ours}
        choice = {"index": 0, "message": message, "finish_reason": self._end, "logprobs": None}
        whole = {"object": "chat.completion", "choices": [choice], "usage": self.usage}
        return self.identity | whole

    def last_chunks(self, include_usage: bool) -> Iterator[dict[str, Any]]:
        yield chunk(self.identity, self._ours, self._end)
        if include_usage:
            yield chunk(self.identity, {}) | {"choices": [], "usage": self.usage}


def chunk(identity: dict[str, Any], delta: dict[str, Any], end: str | None = None) -> dict:
    """A piece of a streamed answer."""
    choice = {"index": 0, "delta": delta, "finish_reason": end, "logprobs": None}
    return identity | {"object": "chat.completion.chunk", "choices": [choice]}

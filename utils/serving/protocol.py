"""OpenAI's chat completions as this server reads and writes them.

A request is a conversation about one picture: the first message of the user brings it, the further
ones are follow-up questions, and answers stand between them with their tokens written out. What the
model cannot do is refused by the name of the field, never ignored.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import io
import re
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cores.dataset.conversation.turns import Answer, AnswerToken, Turn
from cores.model.inference.inputs import clean_question, load_image
from cores.model.inference.results import Result

FETCH_SECONDS = 10.0


class Refused(Exception):
    """A request that is answered with an error in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str = ""):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_dict(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code or None}
        return {"error": error}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Part):
    type: Literal["text"]
    text: str


class ImageAddress(_Part):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: ImageAddress


class UserMessage(_Part):
    role: Literal["user"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None


class AssistantMessage(BaseModel):
    """A message of ours may come back as it was sent, with its masks, which are not needed."""

    role: Literal["assistant"]
    content: str | list[TextPart]


class StreamOptions(_Part):
    include_usage: bool = False


class TextFormat(_Part):
    type: Literal["text"]


class ChatRequest(_Part):
    """Fields with one value only are those that clients send whether they matter or not."""

    model: str
    messages: list[Annotated[UserMessage | AssistantMessage, Field(discriminator="role")]]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: Literal[0] | None = None
    """Answers are greedy."""
    top_p: Literal[1] | None = None
    n: Literal[1] | None = None
    seed: int | None = None
    """Answers are the same with any."""
    user: str | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None


@dataclass
class Question:
    """A request, ready for the model."""

    image: np.ndarray
    """uint8 (H, W, 3) RGB."""
    history: list[Turn]
    text: str
    model: str
    stream: bool
    include_usage: bool
    max_tokens: int | None


def read_request(body: bytes, levels: Sequence[str], fetch: int) -> Question:
    """``body``: JSON of a ChatRequest; ``levels``: names of the answer tokens; ``fetch``: bytes
    that may be fetched from an address of the web, 0 where none may be. Raises Refused naming the
    field."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the body"
        if first["type"] == "json_invalid":
            raise Refused(400, f"the body is no JSON: {first['msg']}") from None
        raise Refused(422, f"{place}: {first['msg']}", place) from None
    turns, image = _turns(request, levels, fetch)
    history = [(question, answer) for question, answer in turns[:-1] if answer is not None]
    return Question(
        image,
        history,
        turns[-1][0],
        request.model,
        request.stream,
        bool(request.stream_options and request.stream_options.include_usage),
        min(filter(None, (request.max_tokens, request.max_completion_tokens)), default=None),
    )


def _turns(
    request: ChatRequest, levels: Sequence[str], fetch: int
) -> tuple[list[tuple[str, Answer | None]], np.ndarray]:
    """(question, answer) pairs, of which the last has none, and the picture."""
    turns: list[tuple[str, Answer | None]] = []
    image = None
    for number, message in enumerate(request.messages):
        where = f"messages.{number}"
        asked = isinstance(message, UserMessage)
        if asked != (number % 2 == 0):
            raise Refused(422, f"{where}: user and assistant take turns, the user first", where)
        if isinstance(message, AssistantMessage):
            said = message.content
            text = said if isinstance(said, str) else "".join(part.text for part in said)
            turns[-1] = (turns[-1][0], answer_from_text(text, levels))
            continue
        parts = [message.content] if isinstance(message.content, str) else message.content
        texts = [p if isinstance(p, str) else p.text for p in parts if not isinstance(p, ImagePart)]
        try:
            turns.append((clean_question(" ".join(texts)), None))
        except ValueError as error:
            raise Refused(422, f"{where}: {error}", where) from None
        for position, part in enumerate(parts):
            if isinstance(part, ImagePart):
                if image is not None or number:
                    one = "a conversation is about one picture, which its first message brings"
                    raise Refused(422, f"{where}.content.{position}: {one}", where)
                image = read_picture(part.image_url.url, f"{where}.content.{position}", fetch)
    if not turns or turns[-1][1] is not None:
        raise Refused(422, "messages: the last one must be a question of the user", "messages")
    if image is None:
        raise Refused(422, "messages.0: has no picture; add an image_url part", "messages.0")
    return turns, image


def answer_from_text(text: str, levels: Sequence[str]) -> Answer:
    """An answer as it was sent, in pieces, with its tokens as tokens again."""
    pattern = "|".join(re.escape(f"[{level}]") for level in levels)
    pieces = re.split(f"({pattern})", text.strip())
    tokens = {f"[{level}]": AnswerToken(level) for level in levels}
    return [tokens.get(piece, piece) for piece in pieces if piece]


def read_picture(address: str, where: str, fetch: int) -> np.ndarray:
    """The picture, uint8 (H, W, 3), of a data: or, where ``fetch`` bytes may be fetched, an http(s)
    address. Raises Refused."""
    if address.startswith("data:"):
        head, comma, content = address.partition(",")
        if not comma or not head.endswith(";base64"):
            raise Refused(
                422, f"{where}: a data address needs the form data:image/…;base64,…", where
            )
        try:
            data = base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError):
            raise Refused(400, f"{where}: is not valid base64", where) from None
    elif re.match(r"https?://", address, re.IGNORECASE):
        if not fetch:
            refused = "addresses of the web are not fetched here (--allow_urls); send data:image/…"
            raise Refused(422, f"{where}: {refused}", where)
        data = _fetched(address, where, fetch)
    else:
        raise Refused(422, f"{where}: give a picture as data:image/…;base64,…", where)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return load_image(picture, "the picture")[0]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        said = "cannot be read as a picture" if isinstance(error, OSError) else str(error)
        raise Refused(400, f"{where}: {said}", where, "invalid_image") from None


def _fetched(address: str, where: str, most: int) -> bytes:
    """What lies at an address of the open web. The name is looked up once, and only an address of
    the internet is connected to, so that nobody reaches this machine's own network through it;
    redirections are not followed."""
    parts = urlsplit(address)
    until = time.monotonic() + FETCH_SECONDS
    try:
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        places = [str(entry[4][0]) for entry in found]
        if not all(ip_address(place).is_global for place in places):
            raise Refused(422, f"{where}: {host} is not an address of the open web", where)
        connection = http.client.HTTPConnection(host, port, timeout=FETCH_SECONDS)
        connection.sock = socket.create_connection((places[0], port), FETCH_SECONDS)
        if parts.scheme == "https":
            secure = ssl.create_default_context()
            connection.sock = secure.wrap_socket(connection.sock, server_hostname=host)
        with contextlib.closing(connection):
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept": "image/*"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise Refused(400, f"{where}: the address answers {answer.status}", where)
            data = b""
            while part := answer.read1(65536):
                data += part
                if len(data) > most or time.monotonic() > until:
                    limit = f"{most} bytes and {FETCH_SECONDS:g} seconds"
                    raise Refused(400, f"{where}: is more than {limit}", where)
            return data
    except (OSError, ValueError, http.client.HTTPException):
        raise Refused(400, f"{where}: could not be fetched", where) from None


# ------------------------------------------------------------------------------------- answers


def reason_of_end(result: Result) -> str:
    return "stop" if result.finished else "length"


def usage(result: Result, prompt_tokens: int) -> dict[str, int]:
    completion = len(result.token_ids) + result.finished  # the end token
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
    }


def masks(result: Result) -> list[dict[str, Any]]:
    """One entry for each complete group of answer tokens, in the order of the text: "token" is its
    last one, "rle" COCO's run lengths in the picture's own size, "box" [x0, y0, x1, y1] or null
    where the mask is empty, "area" pixels, "predicted_iou" SAM's estimate, and "chain" the coarser
    masks on the way."""
    rows = []
    for found in result.masks:
        rows.append({"token": f"[{list(found.levels)[-1]}]"} | found.to_dict())
    return rows


def completion(identity: dict[str, Any], result: Result, prompt_tokens: int) -> dict[str, Any]:
    """``identity``: id, created and model."""
    message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
    message["masks"] = masks(result)
    choice = {"index": 0, "message": message, "finish_reason": reason_of_end(result)}
    whole = identity | {"object": "chat.completion", "choices": [choice | {"logprobs": None}]}
    return whole | {"usage": usage(result, prompt_tokens)}


def chunk(identity: dict[str, Any], delta: dict[str, Any], end: str | None = None) -> dict:
    """A piece of a streamed answer; the last one has the masks."""
    choice = {"index": 0, "delta": delta, "finish_reason": end, "logprobs": None}
    return identity | {"object": "chat.completion.chunk", "choices": [choice]}


def last_chunks(
    identity: dict[str, Any], result: Result, prompt_tokens: int, include_usage: bool
) -> Iterator[dict[str, Any]]:
    yield chunk(identity, {"masks": masks(result)}, reason_of_end(result))
    if include_usage:
        whole = chunk(identity, {}) | {"choices": []}
        yield whole | {"usage": usage(result, prompt_tokens)}

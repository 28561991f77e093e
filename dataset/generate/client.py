"""A client of OpenAI-compatible chat endpoints that sends each request once and keeps what came
back.

A request is known by the hash of its content. One whose answer is in the journal is never sent
again; the others are paced, retried and written down, attempt by attempt. Pictures stand in
requests as the hash of their file; the bytes are put in when the request leaves and are not written
to the journal.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import io
import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx2
import numpy as np
from PIL import Image

from dataset.files.images import read_image
from dataset.generate.journal import Answer, Journal

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
FATAL = {401, 402, 403, 404, 405}  # the same for every request
LONGEST_BACKOFF = 60.0  # seconds
LARGEST_REPLY = 1 << 23  # bytes
# "none" or "EMPTY", which local servers take for a key, are no secrets but ordinary words
SHORTEST_SECRET = 8


class ChatError(RuntimeError):
    """One request got no usable answer; the others may."""


class Abort(RuntimeError):
    """No request will get an answer: a wrong key, address or model, no money left, a server that is
    down."""


class Stopped(RuntimeError):
    """The run is over; nothing more is sent."""


class NotAsked(RuntimeError):
    """A dry run came to a request whose answer it would need to go on."""


@dataclass(frozen=True)
class Request:
    """One question to a model."""

    stage: str
    """What the request is for: "caption", "questions", …"""
    item: str
    """What it is about, for messages and the journal."""
    messages: list[dict[str, Any]]
    images: dict[str, Path] = field(default_factory=dict)
    """What stands for a picture in ``messages`` -> its file."""
    number: int = 0
    """Raised to ask the same once more."""
    more: int = 0
    """How many further requests may follow if the checks refuse the answer; for the estimate."""
    stand_in: str | None = None
    """What a dry run goes on with instead of an answer; None: it cannot go on."""


class Chat(Protocol):
    def ask(self, request: Request) -> Answer: ...


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask."""

    base_url: str
    """Ends in /v1 as a rule; /chat/completions is added."""
    model: str
    api_key: str = field(default="", repr=False)
    max_tokens: int = 800
    temperature: float = 0.7
    seed: int = 0
    image_side: int = 1024
    """Pictures are sent with at most this longest side, in pixels."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of the request; null removes a field."""
    timeout: float = 120.0
    """Seconds from the start of an attempt to the end of its reply."""
    retries: int = 6
    backoff: float = 1.0
    """Seconds before the first retry; doubles with each."""
    max_wait: float = 600.0
    """A server that asks for a longer pause, in seconds, ends the run."""

    def __post_init__(self):
        """Raises ValueError."""
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"--base_url {self.base_url!r} is not an address such as http://localhost:8000/v1"
            )
        if parts.username or parts.password or parts.query:
            raise ValueError(
                "--base_url holds a password or a query; the key belongs in the environment"
                " (--api_key_env)"
            )
        if not self.model:
            raise ValueError("--model is empty; name the model that the endpoint serves")
        if not self.api_key.isascii() or not self.api_key.isprintable():
            raise ValueError(
                "the key in the environment holds characters that no key has; copy it again"
            )

    @property
    def url(self) -> str:
        return self.base_url.rstrip("/") + "/chat/completions"

    def body(self, request: Request) -> dict[str, Any]:
        """The request as JSON, with hashes in place of pictures."""
        fields = {
            "model": self.model,
            "messages": request.messages,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed + request.number,
        } | self.extra
        return {name: value for name, value in fields.items() if value is not None}

    def key(self, request: Request) -> str:
        # the number is in the key, too: "seed" may have been removed from the body
        content = json.dumps([self.body(request), request.number], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def picture(path: Path, side: int) -> tuple[dict[str, Any], dict[str, Path]]:
    """(message part, Request.images) of the picture in ``path``, to be sent with its longest side
    at most ``side`` pixels."""
    name = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()};side={side}"
    return {"type": "image_url", "image_url": {"url": name}}, {name: path}


def data_url(image: np.ndarray, side: int) -> str:
    """``image``, uint8 (H, W, 3) RGB, as a JPEG of at most ``side`` pixels in a data URL."""
    small = Image.fromarray(image)
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


class Pacer:
    """Lets requests start at most so often, and none during a pause; for all threads together."""

    def __init__(self, per_minute: float, stop: threading.Event):
        """``per_minute``: 0 sets no limit."""
        self._interval = 60 / per_minute if per_minute else 0.0
        self._stop = stop
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait(self) -> None:
        """Returns when one request may start. Raises Stopped."""
        while not self._stop.is_set():
            with self._lock:
                now = time.monotonic()
                rest = self._free_at - now
                if rest <= 0:
                    self._free_at = now + self._interval
                    return
            self._stop.wait(rest)
        raise Stopped

    def pause(self, seconds: float) -> None:
        """No request starts before so many seconds have passed."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic() + seconds)


@dataclass(frozen=True)
class _Failure:
    reason: str
    status: int | None = None
    wait: float | None = None
    """Seconds that the server asks to wait."""
    retried: bool = True
    fatal: bool = False


class ChatClient:
    """Asks one endpoint; used by many threads at once."""

    def __init__(self, endpoint: Endpoint, journal: Journal, pacer: Pacer, stop: threading.Event):
        self.endpoint, self.journal, self.used = endpoint, journal, {}
        """``used``: Answer by (stage, key) of all that was asked, sent now or earlier."""
        self._pacer, self._stop = pacer, stop
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._guard = threading.Lock()
        # redirects would carry the key to another host
        self._http = httpx2.Client(timeout=httpx2.Timeout(endpoint.timeout), follow_redirects=False)

    def close(self) -> None:
        self._http.close()

    def ask(self, request: Request) -> Answer:
        """The answer, from the journal where it is there. Raises ChatError, Abort or Stopped."""
        key = self.endpoint.key(request)
        with self._guard:
            lock = self._locks[key]
        with lock:  # two equal requests at a time are one
            answer = self.journal.answer(key) or self._send(key, request)
        self.used[request.stage, key] = answer
        return answer

    def _send(self, key: str, request: Request) -> Answer:
        content = self._content(request)
        for attempt in range(self.endpoint.retries + 1):
            self._pacer.wait()
            started = time.monotonic()
            reply, outcome = self._attempt(content)
            answer = outcome if isinstance(outcome, Answer) else None
            facts = {
                "stage": request.stage,
                "item": request.item,
                "attempt": attempt,
                "request": self.endpoint.body(request),
            }
            failed = (
                {"status": 200, "error": None}
                if answer
                else {"status": outcome.status, "error": outcome.reason}
            )
            seconds = round(time.monotonic() - started, 3)
            self.journal.append(key, answer, **facts, **failed, seconds=seconds, reply=reply)
            if answer:
                return answer
            self._after(outcome, key, attempt, request)
        raise ChatError(
            f"{request.stage} {request.item}: no answer after {attempt + 1} attempts; the last:"
            f" {outcome.reason}"
        )

    def _content(self, request: Request) -> bytes:
        text = json.dumps(self.endpoint.body(request))
        for name, path in request.images.items():
            text = text.replace(name, data_url(read_image(path), self.endpoint.image_side))
        return text.encode()

    def _attempt(self, content: bytes) -> tuple[str | None, Answer | _Failure]:
        """(text of the reply or None, what it means)."""
        headers = {"Content-Type": "application/json"}
        if self.endpoint.api_key:
            headers["Authorization"] = f"Bearer {self.endpoint.api_key}"
        deadline = time.monotonic() + self.endpoint.timeout
        try:
            with self._http.stream(
                "POST", self.endpoint.url, content=content, headers=headers
            ) as response:
                text = self._scrub(_read(response, deadline))
                return text, _judge(response.status_code, response.headers, text)
        except httpx2.UnsupportedProtocol as error:
            raise Abort(f"--base_url: {error}") from None
        except (httpx2.TimeoutException, TimeoutError):
            return None, _Failure(f"no whole reply within {self.endpoint.timeout:g} s")
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            return None, _Failure(self._scrub(_line(f"{type(error).__name__}: {error}")))

    def _scrub(self, text: str) -> str:
        key = self.endpoint.api_key
        return text.replace(key, "***") if len(key) >= SHORTEST_SECRET else text

    def _after(self, failure: _Failure, key: str, attempt: int, request: Request) -> None:
        """Waits before the next attempt. Raises Abort or ChatError where there is none, Stopped
        where the run is over."""
        if failure.fatal:
            raise Abort(f"{self.endpoint.url}: {failure.reason}")
        if not failure.retried:
            raise ChatError(f"{request.stage} {request.item}: {failure.reason}")
        if failure.wait is not None:
            if failure.wait > self.endpoint.max_wait:
                asked = (
                    f"the server asks to wait {failure.wait:.0f} s, longer than --max_wait"
                    f" {self.endpoint.max_wait:g}"
                )
                raise Abort(f"{self.endpoint.url}: {asked}; run the same command again later")
            self._pacer.pause(failure.wait)  # the limit is the account's, not this request's
        # the same for every run of the same request, but different between requests: they must not
        # all come back at once
        jitter = random.Random(f"{key}{attempt}").uniform(0.5, 1.0)
        if self._stop.wait(min(LONGEST_BACKOFF, self.endpoint.backoff * 2**attempt) * jitter):
            raise Stopped


def _read(response: httpx2.Response, deadline: float) -> str:
    """The body; a server that sends it drop by drop does not hold us beyond the ``deadline``."""
    chunks, size = [], 0
    for chunk in response.iter_bytes():
        if time.monotonic() > deadline:
            raise TimeoutError
        chunks.append(chunk)
        size += len(chunk)
        if size > LARGEST_REPLY:
            raise httpx2.StreamError(f"a reply of more than {LARGEST_REPLY} bytes")
    return b"".join(chunks).decode("utf-8", "replace")


def _line(text: str, longest: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _judge(status: int, headers: httpx2.Headers, text: str) -> Answer | _Failure:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if status == 200:
        return _read_answer(content, text)
    error = content.get("error") if isinstance(content, dict) else None
    code = error.get("code") or error.get("type") if isinstance(error, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    reason = f"HTTP {status}: {_line(said if isinstance(said, str) else text) or 'no reason given'}"
    if status in FATAL or 300 <= status < 400 or code == "insufficient_quota":
        return _Failure(
            f"{reason}; check --base_url, --model and the key in the environment",
            status,
            fatal=True,
        )
    return _Failure(reason, status, _retry_after(headers), retried=status in RETRIED)


def _read_answer(content: Any, text: str) -> Answer | _Failure:
    try:
        choice = content["choices"][0]
        message = choice["message"]
        words, refusal = message.get("content"), message.get("refusal")
        if isinstance(words, list):  # parts
            words = "".join(part["text"] for part in words if part.get("type") == "text")
        if not isinstance(words, str) and not refusal:
            raise TypeError
        usage = content.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        counts = [count if type(count) is int and count >= 0 else None for count in counts]
        finish = (
            "refusal" if not isinstance(words, str) else str(choice.get("finish_reason") or "stop")
        )
        return Answer(words or "", finish, *counts)
    except (TypeError, KeyError, IndexError, AttributeError):
        what = "not JSON" if content is None else "no chat completion"
        return _Failure(f"the reply is {what}: {_line(text, 80)!r}", 200)


def _retry_after(headers: httpx2.Headers) -> float | None:
    """Seconds, from a number or a date; None where it is missing or neither."""
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds == seconds else None  # NaN is a number, too


def callable_key(name: str, request: Request) -> str:
    """The key of a request to a local model."""
    content = json.dumps([name, request.messages, request.number], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


class CallableChat:
    """A model in this process, such as a local LLaVA, behind the same journal."""

    def __init__(self, describe: Callable[[np.ndarray, str], str], name: str, journal: Journal):
        """``describe(image, instruction)``: the words of the model about ``image``, uint8 (H, W, 3)
        RGB. ``name``: which model."""
        self.describe, self.name, self.journal, self.used = describe, name, journal, {}
        self._lock = threading.Lock()

    def ask(self, request: Request) -> Answer:
        key = callable_key(self.name, request)
        with self._lock:  # one model, one device
            answer = self.journal.answer(key)
            if answer is None:
                (path,) = request.images.values()
                instruction = "\n".join(texts_of(request.messages))
                answer = Answer(self.describe(read_image(path), instruction), "stop", 0, 0)
                facts = {
                    "stage": request.stage,
                    "item": request.item,
                    "attempt": 0,
                    "request": {"model": self.name},
                }
                self.journal.append(key, answer, **facts, status=None, error=None)
        self.used[request.stage, key] = answer
        return answer

    def close(self) -> None:
        """Nothing to close."""


def texts_of(messages: list[dict[str, Any]]) -> list[str]:
    """All texts of ``messages``, in order."""
    parts = [message["content"] for message in messages]
    parts = [[{"type": "text", "text": part}] if isinstance(part, str) else part for part in parts]
    return [part["text"] for content in parts for part in content if part["type"] == "text"]

"""Models to ask: a client of OpenAI-compatible chat endpoints, and a model in this process.

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
import math
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx2
import numpy as np
from PIL import Image

from cores.dataset.command import shown
from cores.dataset.files.images import read_image
from cores.dataset.generate.journal import Answer, Journal

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
FATAL = {401, 402, 403, 404, 405}  # every other request would get the same
LONGEST_BACKOFF = 60.0  # seconds
LARGEST_REPLY = 1 << 23  # bytes
# A shorter key, such as "none" or "EMPTY" for a local server, is an ordinary word and no secret.
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
    """The name of each picture in ``messages`` -> its file, see ``image_part``."""
    number: int = 0
    """Another number asks the same once more."""
    more: int = 0
    """How many further requests may follow if the checks refuse the answer; for the estimate."""
    stand_in: str | None = None
    """What a dry run goes on with instead of an answer; None: it cannot go on."""


class ChatModel(Protocol):
    """A model to ask, or its stand-in."""

    used: dict[tuple[str, str], Answer]
    """By (stage, key): all that was asked, now or by an earlier run."""

    def ask(self, request: Request) -> Answer: ...

    def close(self) -> None: ...


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
        # The number is in the key, too, as --extra may have removed "seed" from the body.
        content = json.dumps([self.body(request), request.number], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def image_part(path: Path, side: int) -> tuple[dict[str, Any], dict[str, Path]]:
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
class Failure:
    """Why an attempt got no answer."""

    reason: str
    status: int | None = None
    """Of HTTP; None where no whole reply came."""
    wait: float | None = None
    """Seconds that the server asks to wait."""
    retried: bool = True
    """Whether another attempt may succeed."""
    fatal: bool = False
    """Whether every other request would fail, too."""


class ChatClient:
    """Asks one endpoint; used by many threads at once."""

    def __init__(self, endpoint: Endpoint, journal: Journal, pacer: Pacer, stop: threading.Event):
        self.endpoint, self.journal = endpoint, journal
        self.used: dict[tuple[str, str], Answer] = {}
        self._pacer, self._stop = pacer, stop
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._guard = threading.Lock()
        # A redirect would carry the key to another host.
        self._http = httpx2.Client(timeout=httpx2.Timeout(endpoint.timeout), follow_redirects=False)

    def close(self) -> None:
        self._http.close()

    def ask(self, request: Request) -> Answer:
        """The answer, from the journal where it is there. Raises ChatError, Abort or Stopped."""
        key = self.endpoint.key(request)
        with self._guard:
            lock = self._locks[key]
        with lock:  # the second of two equal requests finds the answer of the first
            answer = self.journal.answer(key) or self._send(key, request)
        self.used[request.stage, key] = answer
        return answer

    def _send(self, key: str, request: Request) -> Answer:
        body = self.endpoint.body(request)
        text = json.dumps(body)
        for name, path in request.images.items():
            text = text.replace(name, data_url(read_image(path), self.endpoint.image_side))
        content = text.encode()
        for attempt in range(self.endpoint.retries + 1):
            self._pacer.wait()
            started = time.monotonic()
            reply, outcome = self._attempt(content)
            facts = {"stage": request.stage, "item": request.item, "attempt": attempt}
            facts |= {"request": body, "status": 200, "error": None}
            times = {"seconds": round(time.monotonic() - started, 3), "reply": reply}
            if isinstance(outcome, Answer):
                self.journal.append(key, outcome, **facts, **times)
                return outcome
            facts |= {"status": outcome.status, "error": outcome.reason}
            self.journal.append(key, None, **facts, **times)
            self._before_retry(outcome, key, attempt, request)
            reason = outcome.reason
        raise ChatError(
            f"{request.stage} {request.item}: no answer after {attempt + 1} attempts; the last:"
            f" {reason}"
        )

    def _attempt(self, content: bytes) -> tuple[str | None, Answer | Failure]:
        """(text of the reply or None, what it means)."""
        headers = {"Content-Type": "application/json"}
        if self.endpoint.api_key:
            headers["Authorization"] = f"Bearer {self.endpoint.api_key}"
        deadline = time.monotonic() + self.endpoint.timeout
        post = partial(self._http.stream, "POST", self.endpoint.url)
        try:
            with post(content=content, headers=headers) as response:
                text = self._scrub(_read(response, deadline))
                return text, read_reply(response.status_code, response.headers, text)
        except httpx2.UnsupportedProtocol as error:
            raise Abort(f"--base_url: {error}") from None
        except (httpx2.TimeoutException, TimeoutError):
            return None, Failure(f"no whole reply within {self.endpoint.timeout:g} s")
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            return None, Failure(self._scrub(_shortened(f"{type(error).__name__}: {error}")))

    def _scrub(self, text: str) -> str:
        key = self.endpoint.api_key
        return text.replace(key, "***") if len(key) >= SHORTEST_SECRET else text

    def _before_retry(self, failure: Failure, key: str, attempt: int, request: Request) -> None:
        """Waits before the next attempt. Raises Abort or ChatError where there is none, Stopped
        where the run is over."""
        if failure.fatal:
            raise Abort(f"{self.endpoint.url}: {failure.reason}")
        if not failure.retried:
            raise ChatError(f"{request.stage} {request.item}: {failure.reason}")
        if failure.wait is not None:
            if failure.wait > self.endpoint.max_wait:
                raise Abort(
                    f"{self.endpoint.url}: the server asks to wait {failure.wait:.0f} s, longer"
                    f" than --max_wait {self.endpoint.max_wait:g}; run the same command again later"
                )
            self._pacer.pause(failure.wait)  # the limit is the account's, not this request's
        # Requests that failed together must not all come back together.
        jitter = random.Random(f"{key}{attempt}").uniform(0.5, 1.0)
        if self._stop.wait(min(LONGEST_BACKOFF, self.endpoint.backoff * 2**attempt) * jitter):
            raise Stopped


def _read(response: httpx2.Response, deadline: float) -> str:
    """The body. Raises TimeoutError at the ``deadline``, also where the server sends drop by drop
    and no single read times out."""
    chunks, size = [], 0
    for chunk in response.iter_bytes():
        if time.monotonic() > deadline:
            raise TimeoutError
        chunks.append(chunk)
        size += len(chunk)
        if size > LARGEST_REPLY:
            raise httpx2.StreamError(f"a reply of more than {LARGEST_REPLY} bytes")
    return b"".join(chunks).decode("utf-8", "replace")


def _shortened(text: str, longest: int = 200) -> str:
    """``text`` in one line."""
    text = " ".join(shown(text).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def read_reply(status: int, headers: httpx2.Headers, text: str) -> Answer | Failure:
    """What a whole reply means."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if status == 200:
        return _read_completion(content, text)
    error = content.get("error") if isinstance(content, dict) else None
    code, message = None, error
    if isinstance(error, dict):
        code, message = error.get("code") or error.get("type"), error.get("message")
    message = _shortened(message if isinstance(message, str) else text) or "no reason given"
    reason = f"HTTP {status}: {message}"
    if status in FATAL or 300 <= status < 400 or code == "insufficient_quota":
        reason += "; check --base_url, --model and the key in the environment"
        return Failure(reason, status, fatal=True)
    return Failure(reason, status, retry_after(headers), retried=status in RETRIED)


def _read_completion(content: Any, text: str) -> Answer | Failure:
    try:
        choice = content["choices"][0]
        written, refusal = choice["message"].get("content"), choice["message"].get("refusal")
        if isinstance(written, list):  # the text may come in parts
            written = "".join(part["text"] for part in written if part.get("type") == "text")
        if not isinstance(written, str) and not refusal:
            raise TypeError
        finish = str(choice.get("finish_reason") or "stop")
        usage = content.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        counts = [count if type(count) is int and count >= 0 else None for count in counts]
        return Answer(written or "", finish if isinstance(written, str) else "refusal", *counts)
    except (TypeError, KeyError, IndexError, AttributeError):
        what = "not JSON" if content is None else "no chat completion"
        return Failure(f"the reply is {what}: {_shortened(text, 80)!r}", 200)


def retry_after(headers: httpx2.Headers) -> float | None:
    """Seconds, from a number or a date; None where it is missing or neither."""
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return None if math.isnan(seconds) else max(0.0, seconds)


def local_key(name: str, request: Request) -> str:
    """The key of a request to a local model."""
    content = json.dumps([name, request.messages, request.number], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


class LocalModel:
    """A model in this process, such as a LLaVA, behind the same journal."""

    def __init__(self, describe: Callable[[np.ndarray, str], str], name: str, journal: Journal):
        """``describe(image, instruction)``: the model's text about ``image``, uint8 (H, W, 3) RGB.
        ``name``: which model."""
        self.describe, self.name, self.journal = describe, name, journal
        self.used: dict[tuple[str, str], Answer] = {}
        self._lock = threading.Lock()

    def ask(self, request: Request) -> Answer:
        key = local_key(self.name, request)
        with self._lock:  # Two threads must not ask the model at a time.
            answer = self.journal.answer(key)
            if answer is None:
                (path,) = request.images.values()
                instruction = "\n".join(texts_of(request.messages))
                answer = Answer(self.describe(read_image(path), instruction), "stop", 0, 0)
                facts = {"stage": request.stage, "item": request.item, "attempt": 0}
                facts |= {"request": {"model": self.name}, "status": None, "error": None}
                self.journal.append(key, answer, **facts)
        self.used[request.stage, key] = answer
        return answer

    def close(self) -> None:
        """Nothing to close."""


def texts_of(messages: list[dict[str, Any]]) -> list[str]:
    """All texts of ``messages``, in order."""
    texts = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            texts.append(content)
        else:
            texts += [part["text"] for part in content if part["type"] == "text"]
    return texts

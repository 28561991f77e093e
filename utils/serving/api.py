"""A server of OpenAI's chat completions around one model; docs/serve.md has more.

One thread has the model, and requests wait for it in the order of arrival, so that an answer is
what the same question gets from Python. Pictures that were asked about last are kept as the model
reads them: a follow-up question costs its own tokens only. What waits is a picture's file, not its
pixels.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NoReturn

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from PIL import Image
from transformers.utils import logging as transformers_logging

from cores.dataset import command
from cores.dataset.command import one_line, shown
from cores.dataset.files.errors import DataError
from cores.model.inference.segmenter import ReasoningSegmenter, Session
from cores.utils import distributed
from cores.utils.asking import LESS_MEMORY, load_segmenter
from cores.utils.serving import protocol, sent
from cores.utils.serving.guard import refused_site, served_names
from cores.utils.serving.protocol import Answered, Question, Refused
from cores.utils.serving.sent import SentPicture
from cores.utils.settings.flags import UsageError
from cores.utils.settings.programs import KEY_VARIABLE, read_serve

COMPLETIONS = "/v1/chat/completions"
LOOK_EVERY = 0.5  # seconds after which it is looked whether a client has left
READ_WITHIN = 60.0  # seconds for a client to send its request
DISCARD_WITHIN = 5.0  # seconds for the rest of one that is refused
STOP_WITHIN = 30.0  # seconds for the answer that is being made when the server is asked to stop
# Metric -> (kind, what it counts).
METRICS = {
    "requests_total": ("counter", "Requests for an answer, by how they ended."),
    "requests_waiting": ("gauge", "Requests that wait for the model."),
    "requests_running": ("gauge", "Requests that the model works on, 0 or 1."),
    "request_seconds": ("summary", "From a request's arrival to the end of its answer."),
    "model_seconds": ("summary", "What the model worked for an answer."),
    "prompt_tokens_total": ("counter", "Tokens read, those of pictures among them."),
    "completion_tokens_total": ("counter", "Tokens generated."),
    "masks_total": ("counter", "Masks in answers, one for every level."),
}


class GivenUp(Exception):
    """Nobody waits for the answer any more."""


class Answering:
    """An answer on its way from the thread of the model to the event loop."""

    def __init__(self, question: Question, picture: SentPicture, identity: dict[str, Any]):
        self.question, self.picture, self.identity = question, picture, identity
        self.begun = False
        self.given_up = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | Answered | BaseException] = asyncio.Queue()

    def tell(self, piece: str | Answered | BaseException) -> None:
        """Called by the thread of the model."""
        with contextlib.suppress(RuntimeError):  # The loop has ended.
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def next(self) -> str | Answered:
        """A piece of text, or the whole answer at the end. Raises what ended the answer."""
        piece = await self._pieces.get()
        if isinstance(piece, BaseException):
            raise piece
        return piece


class Model:
    """The model and the one thread that uses it."""

    def __init__(self, keep: int, most_tokens: int):
        """``keep``: pictures that are kept as the model reads them."""
        self.segmenter: ReasoningSegmenter | None = None
        self.most_tokens, self.keep = most_tokens, keep
        self.busy = 0
        """1 while the model loads or answers."""
        self.answers, self.seconds = 0, 0.0
        """How many were made, and how long that took."""
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "model")

    def load(self, load: Callable[[], ReasoningSegmenter], failed: Callable) -> None:
        """Begins to load; ``failed`` is called with what goes wrong."""

        def run() -> None:
            try:
                self.segmenter = load()
            except BaseException as error:
                failed(error)
            finally:
                self.busy = 0

        self.busy = 1
        self._thread.submit(run)

    def ask(self, answering: Answering) -> None:
        self._thread.submit(self._answer, answering)

    def close(self) -> None:
        """Begins nothing that was not begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _answer(self, answering: Answering) -> None:
        if answering.given_up.is_set():
            return
        answering.begun, self.busy, begun = True, 1, time.monotonic()
        try:
            answered = self._answered(answering)
            self.answers, self.seconds = self.answers + 1, self.seconds + time.monotonic() - begun
            self.busy = 0
            answering.tell(answered)
        except BaseException as error:
            if command.out_of_memory(error):
                self._sessions.clear()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            self.busy = 0
            answering.tell(error)

    def _answered(self, answering: Answering) -> Answered:
        assert self.segmenter is not None
        question, picture = answering.question, answering.picture
        key = hashlib.sha256(picture.content).digest()
        session = self._sessions.pop(key, None)
        if session is None:
            while len(self._sessions) >= self.keep:
                self._sessions.popitem(last=False)
            session = self.segmenter.open(picture.pixels())
        session.turns = list(question.history)
        self.segmenter.decoding = question.decoding(self.most_tokens)
        if question.seed is not None:
            torch.manual_seed(question.seed)
        stream = session.stream(question.text)
        for piece in stream:
            if answering.given_up.is_set():
                stream.close()
                raise GivenUp
            answering.tell(piece)
        self._sessions[key] = session  # not one that failed
        result, processor = stream.result, self.segmenter.processor
        masks = protocol.masks(result, processor.tokenizer, processor.levels)
        return Answered(answering.identity, result, masks, session.prompt_tokens)


class _Streamed(StreamingResponse):
    """Calls ``ends`` when it is over, also where the client has left before it began."""

    def __init__(self, pieces: AsyncIterator[str], ends: contextlib.ExitStack):
        super().__init__(pieces, media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"
        self._ends = ends

    async def __call__(self, *connection: Any) -> None:
        with self._ends:
            await super().__call__(*connection)


class Server:
    """The application; ``app`` is what uvicorn serves."""

    def __init__(self, args: Namespace, key: str | None):
        """``key``: what requests must bring, None for nothing. Limits the pixels of all pictures
        of this process."""
        Image.MAX_IMAGE_PIXELS = args.max_megapixels * 10**6
        self.args, self.key = args, key.encode("ascii") if key else None
        self.name = args.served_name or Path(args.version).name
        self.names, self.given = served_names(args.host, args.allowed_hosts)
        self.model = Model(args.keep_ready, args.max_new_tokens)
        self.places = 0
        """Requests that wait or are answered."""
        self.stop_at: float | None = None
        """When the last answer is cut, once the server was asked to stop."""
        self.counts: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()
        self.seconds = 0.0
        self.started = int(time.time())
        self.app = FastAPI(title="CoReS", openapi_url=None, docs_url=None, redoc_url=None)
        for path, handler, method in (
            ("/health", self.health, "GET"),
            ("/metrics", self.metrics, "GET"),
            ("/v1/models", self.models, "GET"),
            ("/v1/models/{name}", self.one_model, "GET"),
            (COMPLETIONS, self.complete, "POST"),
        ):
            self.app.add_api_route(path, handler, methods=[method], response_model=None)
        self.app.add_exception_handler(Refused, self._refuse)
        self.app.add_exception_handler(Exception, self._fail)
        self.app.add_exception_handler(404, self._no_such_path)
        self.app.add_exception_handler(405, self._no_such_path)

    # --------------------------------------------------------------------------------- refusals

    async def _refuse(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        headers = {}
        if error.status in (429, 503):
            headers["Retry-After"] = str(self._retry_after())
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if request.url.path == COMPLETIONS:
            self.counts[str(error.status)] += 1
            await _discard(request, self.args.max_body_mb * 2**20)
        return JSONResponse(error.to_dict(), error.status, headers)

    async def _fail(self, request: Request, error: Exception) -> Response:
        return await self._refuse(request, _defect(error))

    async def _no_such_path(self, request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        what = f"there is no {request.method} {request.url.path[:100]}"
        return JSONResponse(Refused(status, what, code="not_found").to_dict(), status)

    def _retry_after(self) -> int:
        """Seconds until those who wait now are likely to be done."""
        each = self.model.seconds / max(1, self.model.answers)
        return min(60, max(1, math.ceil(self.places * each)))

    def _admit(self, request: Request) -> None:
        """Raises Refused for a request without the key; where none is needed, for one that a web
        site may have made in a visitor's browser."""
        if self.key is None:
            refused = refused_site(request.scope, self.names, self.given)
            if refused is not None:
                raise Refused(*refused, code="wrong_site")
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # The bytes as they came: an HTTP header is decoded as Latin-1.
        right = hmac.compare_digest(given.strip().encode("latin-1"), self.key)
        if scheme.lower() != "bearer" or not right:
            raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")

    # ------------------------------------------------------------------------------ what it tells

    @property
    def state(self) -> str:
        if self.stop_at is not None:
            return "stopping"
        return "loading" if self.model.segmenter is None else "ready"

    async def health(self) -> Response:
        return JSONResponse({"status": self.state}, 200 if self.state == "ready" else 503)

    async def models(self, request: Request) -> dict[str, Any]:
        self._admit(request)
        return {"object": "list", "data": [self._card()]}

    async def one_model(self, request: Request, name: str) -> dict[str, Any]:
        self._admit(request)
        self._require_model(name)
        return self._card()

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "cores"}

    def _require_model(self, name: str) -> None:
        if name != self.name:
            what = f"model: there is no {name[:100]!r} here; it is {self.name!r}"
            raise Refused(404, what, "model", "model_not_found")

    async def metrics(self, request: Request) -> Response:
        self._admit(request)
        running = int(self.model.busy and self.state != "loading")
        values: dict[str, dict[str, float]] = {
            "requests_total": {f'{{status="{k}"}}': n for k, n in sorted(self.counts.items())},
            "requests_waiting": {"": max(0, self.places - running)},
            "requests_running": {"": running},
            "request_seconds": {"_sum": self.seconds, "_count": self.counts["200"]},
            "model_seconds": {"_sum": self.model.seconds, "_count": self.model.answers},
        }
        lines = []
        for name, (kind, words) in METRICS.items():
            lines += [f"# HELP cores_{name} {words}", f"# TYPE cores_{name} {kind}"]
            found = values.get(name, {"": self.totals[name]})
            lines += [f"cores_{name}{suffix} {value:.15g}" for suffix, value in found.items()]
        return PlainTextResponse("\n".join([*lines, ""]), media_type="text/plain; version=0.0.4")

    # ------------------------------------------------------------------------------------ answers

    async def complete(self, request: Request) -> Response:
        """A chat completion. Its place in the line is taken before its body is read, so that no
        more is kept than the line is long."""
        self._admit(request)
        if self.state != "ready":
            words = {"loading": "the model is being loaded; try again in a moment"}
            raise Refused(
                503, words.get(self.state, "the server is being stopped"), code=self.state
            )
        if self.places > self.args.queue:  # The first one does not wait.
            what = f"{self.args.queue} requests wait already; try again later"
            raise Refused(429, what, code="queue_full")
        with contextlib.ExitStack() as ends:
            begun = ends.enter_context(self._place())
            question, picture = await self._read(request)
            identity = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
            answering = Answering(question, picture, identity | {"model": self.name})
            ends.callback(answering.given_up.set)
            self.model.ask(answering)
            # The first piece comes before the headers: until then, an error is a status.
            piece = await self._piece(answering, begun, request)
            if question.stream:
                return _Streamed(self._stream(answering, piece, begun), ends.pop_all())
            while not isinstance(piece, Answered):
                piece = await self._piece(answering, begun, request)
            self._count(piece, begun)
            return JSONResponse(piece.completion())

    @contextlib.contextmanager
    def _place(self) -> Iterator[float]:
        self.places += 1
        try:
            yield time.monotonic()
        finally:
            self.places -= 1

    async def _read(self, request: Request) -> tuple[Question, SentPicture]:
        """Raises Refused."""
        most = self.args.max_body_mb * 2**20
        body = await _body(request, most)
        assert self.model.segmenter is not None
        question = await asyncio.to_thread(
            protocol.read_request, body, self.model.segmenter.processor.levels
        )
        self._require_model(question.model)
        address, place = question.address, question.place
        question.address = ""  # It may be as long as the body.
        if address[:5].lower() == "data:":
            picture = await asyncio.to_thread(sent.from_data, address, place)
        elif not address.lower().startswith(("http://", "https://")):
            what = "a picture comes as data:image/…;base64,…"
            raise Refused(422, f"{place}: {what}", place, "invalid_image_url")
        elif not self.args.allow_urls:
            what = "pictures are not fetched from the web by this server; send data:image/…"
            raise Refused(422, f"{place}: {what}", place, "invalid_image_url")
        else:
            picture = await sent.fetch(address, place, most)
        await asyncio.to_thread(picture.require)
        return question, picture

    async def _piece(
        self, answering: Answering, begun: float, request: Request | None
    ) -> str | Answered:
        """The next piece. Where the client has left, the time is over or the server stops, the
        model is told to stop. ``request``: None where something else notices that the client has
        left."""
        waits = asyncio.ensure_future(answering.next())
        try:
            while True:
                left = begun + self.args.time_limit - time.monotonic()
                done, _ = await asyncio.wait([waits], timeout=max(0.0, min(LOOK_EVERY, left)))
                if done:
                    return waits.result()
                if left <= 0:
                    what = f"no answer within {self.args.time_limit:g} seconds"
                    raise Refused(504, what, code="time_limit")
                stops = self.stop_at is not None
                if stops and (not answering.begun or time.monotonic() > (self.stop_at or 0.0)):
                    raise Refused(503, "the server is being stopped", code="stopping")
                if request is not None and await request.is_disconnected():
                    raise Refused(499, "the client has left")
        except (Refused, asyncio.CancelledError):
            raise
        except DataError as error:  # Pictures were refused by then.
            said = one_line(error)
            raise Refused(422, said, "messages", "context_length_exceeded") from None
        except Exception as error:
            if lack := command.out_of_memory(error):
                print(f"error: {lack}; {LESS_MEMORY}", file=sys.stderr, flush=True)
                what = "out of memory; try a shorter conversation or later again"
                raise Refused(503, what, code="out_of_memory") from None
            raise _defect(error) from None
        finally:
            if not waits.done():
                answering.given_up.set()
                waits.cancel()

    async def _stream(
        self, answering: Answering, piece: str | Answered, begun: float
    ) -> AsyncIterator[str]:
        """Server-sent events."""

        def event(content: dict[str, Any]) -> str:
            return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

        identity = answering.identity
        try:
            yield event(protocol.chunk(identity, {"role": "assistant", "content": ""}))
            while not isinstance(piece, Answered):
                yield event(protocol.chunk(identity, {"content": piece}))
                piece = await self._piece(answering, begun, None)
            for last in piece.last_chunks(answering.question.include_usage):
                yield event(last)
            self._count(piece, begun)
            yield "data: [DONE]\n\n"
        except Refused as error:  # The status is sent already.
            self.counts[str(error.status)] += 1
            yield event(error.to_dict())
        except asyncio.CancelledError:
            self.counts["499"] += 1
            raise

    def _count(self, answered: Answered, begun: float) -> None:
        self.counts["200"] += 1
        self.seconds += time.monotonic() - begun
        for name in ("prompt_tokens", "completion_tokens"):
            self.totals[f"{name}_total"] += answered.usage[name]
        self.totals["masks_total"] += sum(row["rle"] is not None for row in answered.masks)

    async def drain(self, now: Callable[[], bool]) -> None:
        """Refuses what is new or waits, and returns when the answer that is being made is out.
        ``now``: whether even that is to be cut."""
        self.stop_at = time.monotonic() + STOP_WITHIN
        # Who still sends a request is not waited for.
        while self.places and time.monotonic() < self.stop_at + 2:
            if now():
                self.stop_at = 0.0
            await asyncio.sleep(0.05)


def _defect(error: Exception) -> Refused:
    """What a client is told of an error that is none of its own; the log has all."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    print(*map(shown, lines), sep="\n", file=sys.stderr, flush=True)
    return Refused(500, "the answer failed; the server's log says why", code="failed")


async def _body(request: Request, most: int) -> bytes:
    """Raises Refused for more than ``most`` bytes, as far as the header says before they come."""
    large = Refused(413, f"the body is more than {most / 2**20:g} MB", code="request_too_large")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > most:
        raise large
    body = bytearray()
    try:
        async with asyncio.timeout(READ_WITHIN):
            async for part in _parts(request):
                body += part
                if len(body) > most:
                    raise large
    except TimeoutError:
        what = f"the request did not arrive within {READ_WITHIN:g} seconds"
        raise Refused(408, what, code="request_timeout") from None
    return bytes(body)


async def _parts(request: Request) -> AsyncIterator[bytes]:
    """The rest of a body; nothing for one that was read. Raises Refused where the client leaves."""
    while not getattr(request.state, "is_read", False):
        message = await request.receive()
        if message["type"] == "http.disconnect":
            request.state.is_read = True
            raise Refused(499, "the client has left")
        request.state.is_read = not message.get("more_body", False)
        yield message.get("body", b"")


async def _discard(request: Request, most: int) -> None:
    """Reads on for a while: many clients see no answer before they have sent all."""
    size = 0
    with contextlib.suppress(TimeoutError, Refused):
        async with asyncio.timeout(DISCARD_WITHIN):
            async for part in _parts(request):
                size += len(part)
                if size > 2 * most:
                    return


class _Uvicorn(uvicorn.Server):
    """Lets the application finish before it stops listening."""

    def __init__(self, server: Server):
        # The server says itself what goes wrong; half a minute has passed when uvicorn would wait.
        super().__init__(
            uvicorn.Config(
                server.app,
                log_level="critical",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=3,
            )
        )
        self._ours = server

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._ours.drain(lambda: self.force_exit)
        await super().shutdown(sockets)


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def api_key(args: Namespace) -> str | None:
    """The key that requests need, None for none. Raises UsageError where others could ask the model
    without one."""
    key = args.api_key or os.environ.get(KEY_VARIABLE, "").strip() or None
    if key and args.no_auth:
        raise UsageError(f"--no_auth: there is a key in --api_key or {KEY_VARIABLE}; drop one")
    if key and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise UsageError(
            f"the key in --api_key or {KEY_VARIABLE} holds more than printable ASCII, which many"
            " clients cannot send; choose another"
        )
    if not (key or is_local(args.host) or args.no_auth):
        raise UsageError(
            f"--host {args.host} lets other machines ask the model: set a key in {KEY_VARIABLE} (or"
            " --api_key, which others on this machine may see), or say --no_auth"
        )
    return key


def listen(host: str, port: int) -> socket.socket:
    """Raises UsageError where it cannot listen."""
    try:
        (family, _, _, _, place), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server(place[:2], family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--host {host} --port {port}: cannot listen there ({reason}); choose another port"
        ) from None


def serve(args: Namespace) -> None:
    """Serves until a signal comes. Raises UsageError for a port in use, and what loading raises."""
    server = Server(args, api_key(args))
    listening = listen(args.host, args.port)
    web = _Uvicorn(server)
    failed: list[BaseException] = []

    def stop(error: BaseException) -> None:
        failed.append(error)
        web.should_exit = True

    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"http://{host}:{listening.getsockname()[1]}/v1", flush=True)
    if server.key is None and not is_local(args.host):
        print("warning: whoever reaches this address may ask the model", file=sys.stderr)
    server.model.load(partial(load_segmenter, args), stop)
    try:
        with listening:
            web.run([listening])
    finally:
        server.model.close()
        if server.model.busy:  # A thread that loads cannot be ended, and Python would wait for it.
            command.leave_by(_leave_at_once)
    if failed:
        raise failed[0]


def _leave_at_once(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


@command.entry(memory=LESS_MEMORY)
def main(argv: list[str] | None = None) -> int:
    """Exit code 2 with one line for a mistake in flags or files, 130 after a signal."""
    distributed.prepare_environment()
    args = read_serve(argv)
    transformers_logging.disable_progress_bar()
    serve(args)
    return 0

"""A server of OpenAI's chat completions around one model; docs/serve.md has more.

One thread has the model, and requests wait for it in the order of arrival, so that an answer is
what the same question gets from Python. Pictures that were asked about last are kept as the model
reads them: a follow-up question costs its own tokens only.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import socket
import sys
import threading
import time
import uuid
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from PIL import Image
from transformers.utils import logging as transformers_logging

from cores.dataset import command
from cores.dataset.command import one_line
from cores.dataset.files.errors import DataError
from cores.model.inference.results import Result
from cores.model.inference.segmenter import ReasoningSegmenter, Session
from cores.model.reasoning.generation import Decoding
from cores.utils.asking import LESS_MEMORY, load_segmenter
from cores.utils.serving import protocol
from cores.utils.serving.protocol import Question, Refused
from cores.utils.settings.flags import UsageError
from cores.utils.settings.programs import KEY_VARIABLE, read_serve

LOOK_EVERY = 0.5  # seconds after which it is looked whether a client has left
STOP_WITHIN = 30  # seconds for answers that are on their way when the server is asked to stop


class GivenUp(Exception):
    """Nobody waits for the answer any more."""


class Answering:
    """An answer on its way from the thread of the model to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | Result | BaseException] = asyncio.Queue()
        self.given_up = threading.Event()
        self.prompt_tokens = 0

    def tell(self, piece: str | Result | BaseException) -> None:
        """Called by the thread of the model."""
        with contextlib.suppress(RuntimeError):  # The loop has ended.
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def next(self) -> str | Result:
        """A piece of text, or the Result at the end. Raises what ended the answer."""
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
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "model")

    def load(self, load: Callable[[], ReasoningSegmenter], failed: Callable) -> None:
        """Begins to load; ``failed`` is called with what goes wrong."""

        def run() -> None:
            try:
                self.segmenter = load()
            except BaseException as error:
                failed(error)

        self._thread.submit(run)

    def ask(self, question: Question, answering: Answering) -> None:
        self._thread.submit(self._answer, question, answering)

    def _answer(self, question: Question, answering: Answering) -> None:
        try:
            if not answering.given_up.is_set():
                answering.tell(self._result(question, answering))
        except BaseException as error:
            answering.tell(error)

    def _result(self, question: Question, answering: Answering) -> Result:
        assert self.segmenter is not None
        tokens = min(question.max_tokens or self.most_tokens, self.most_tokens)
        self.segmenter.decoding = Decoding(tokens)
        key = hmac.digest(b"picture", question.image.tobytes(), "sha256")
        key += str(question.image.shape).encode()
        session = self._sessions.pop(key, None) or self.segmenter.open(question.image)
        self._sessions[key] = session  # the last to be dropped
        while len(self._sessions) > self.keep:
            self._sessions.popitem(last=False)
        session.turns = question.history
        stream = session.stream(question.text)
        for piece in stream:
            if answering.given_up.is_set():
                stream.close()
                raise GivenUp
            answering.tell(piece)
        answering.prompt_tokens = session.prompt_tokens
        return stream.result


class _Streamed(StreamingResponse):
    """Calls ``ends`` when it is over, also where the client has left before it began."""

    def __init__(self, pieces: AsyncIterator[str], ends: contextlib.ExitStack):
        super().__init__(pieces, media_type="text/event-stream")
        self._ends = ends

    async def __call__(self, *connection: Any) -> None:
        with self._ends:
            await super().__call__(*connection)


class Server:
    """The application; ``app`` is what uvicorn serves."""

    def __init__(self, args: Namespace, key: str | None):
        self.args, self.key = args, key.encode() if key else None
        self.name = args.served_name or Path(args.version).name
        self.model = Model(args.keep_ready, args.max_new_tokens)
        self.waiting = 0
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0
        self.started = int(time.time())
        self.app = FastAPI(title="CoReS", openapi_url=None, docs_url=None, redoc_url=None)
        self.app.add_api_route("/health", self.health, methods=["GET"])
        self.app.add_api_route("/metrics", self.metrics, methods=["GET"])
        self.app.add_api_route("/v1/models", self.models, methods=["GET"])
        path = "/v1/chat/completions"
        self.app.add_api_route(path, self.complete, methods=["POST"], response_model=None)
        self.app.add_exception_handler(Refused, self._refuse)
        self.app.add_exception_handler(404, self._no_such_path)
        self.app.add_exception_handler(405, self._no_such_path)

    async def _refuse(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        self.counts[str(error.status)] += 1
        headers = {"Retry-After": "2"} if error.status in (429, 503) else {}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(error.to_dict(), error.status, headers)

    async def _no_such_path(self, request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        what = f"there is no {request.method} {request.url.path}"
        return JSONResponse(Refused(status, what).to_dict(), status)

    def _require_key(self, request: Request) -> None:
        if self.key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if not hmac.compare_digest(given, self.key):
            raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")

    async def health(self) -> Response:
        ready = self.model.segmenter is not None
        return JSONResponse({"status": "ready" if ready else "loading"}, 200 if ready else 503)

    async def models(self, request: Request) -> dict[str, Any]:
        self._require_key(request)
        row = {"id": self.name, "object": "model", "created": self.started, "owned_by": "cores"}
        return {"object": "list", "data": [row]}

    async def metrics(self, request: Request) -> Response:
        self._require_key(request)
        lines = ["# TYPE cores_requests_total counter"]
        lines += [
            f'cores_requests_total{{status="{status}"}} {count}'
            for status, count in sorted(self.counts.items())
        ]
        lines += ["# TYPE cores_answer_seconds summary"]
        lines += [f"cores_answer_seconds_sum {self.seconds:.6f}"]
        lines += [f"cores_answer_seconds_count {self.counts['200']}"]
        lines += ["# TYPE cores_waiting gauge", f"cores_waiting {self.waiting}", ""]
        return PlainTextResponse("\n".join(lines), media_type="text/plain; version=0.0.4")

    async def complete(self, request: Request) -> Response:
        """A chat completion. It waits in line from here on, so that what is refused costs
        nothing."""
        self._require_key(request)
        if self.model.segmenter is None:
            raise Refused(503, "the model is being loaded; try again in a moment")
        body = await self._body(request)
        levels = self.model.segmenter.processor.levels
        fetch = self.args.max_body_mb * 2**20 if self.args.allow_urls else 0
        read = partial(protocol.read_request, body, levels, fetch)
        if self.waiting > self.args.max_queue:
            raise Refused(429, f"{self.args.max_queue} requests wait already; try again later")
        with contextlib.ExitStack() as ends:
            begun = ends.enter_context(self._place())
            question = await asyncio.to_thread(read)
            if question.model != self.name:
                what = f"model: there is no {question.model!r} here; it is {self.name!r}"
                raise Refused(404, what, "model", "model_not_found")
            answering = Answering()
            ends.callback(answering.given_up.set)
            self.model.ask(question, answering)
            identity = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
            identity |= {"model": self.name}
            # The first piece comes before the headers: until then, an error is a status.
            first = await self._piece(answering, begun, request)
            if question.stream:
                pieces = self._stream(identity, question, answering, first, begun)
                return _Streamed(pieces, ends.pop_all())
            while not isinstance(first, Result):
                first = await self._piece(answering, begun, request)
            self._count(begun)
            return JSONResponse(protocol.completion(identity, first, answering.prompt_tokens))

    @contextlib.contextmanager
    def _place(self) -> Iterator[float]:
        self.waiting += 1
        try:
            yield time.monotonic()
        finally:
            self.waiting -= 1

    async def _body(self, request: Request) -> bytes:
        most = self.args.max_body_mb * 2**20
        too_large = Refused(413, f"the body is more than {self.args.max_body_mb} MB")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise too_large
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise too_large
            parts.append(part)
        return b"".join(parts)

    async def _piece(
        self, answering: Answering, begun: float, request: Request | None
    ) -> str | Result:
        """The next piece. Where the client has left or the time is over, the model is told to stop.
        ``request``: None where something else notices that the client has left."""
        waits = asyncio.ensure_future(answering.next())
        try:
            while True:
                left = begun + self.args.time_limit - time.monotonic()
                done, _ = await asyncio.wait([waits], timeout=max(0.0, min(LOOK_EVERY, left)))
                if done:
                    return waits.result()
                if left <= 0:
                    raise Refused(504, f"no answer within {self.args.time_limit:g} seconds")
                if request is not None and await request.is_disconnected():
                    raise Refused(499, "the client has left")
        except (DataError, ValueError) as error:
            raise Refused(422, one_line(error), "messages") from None
        except MemoryError:
            raise Refused(503, "out of memory; try a smaller picture") from None
        except (Refused, asyncio.CancelledError):
            raise
        except Exception as error:
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
            raise Refused(500, "the answer failed; the server's log says why") from None
        finally:
            if not waits.done():
                answering.given_up.set()
                waits.cancel()

    async def _stream(
        self,
        identity: dict[str, Any],
        question: Question,
        answering: Answering,
        piece: str | Result,
        begun: float,
    ) -> AsyncIterator[str]:
        """Server-sent events."""

        def event(content: dict[str, Any]) -> str:
            return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

        try:
            yield event(protocol.chunk(identity, {"role": "assistant", "content": ""}))
            while not isinstance(piece, Result):
                yield event(protocol.chunk(identity, {"content": piece}))
                piece = await self._piece(answering, begun, None)
            ends = protocol.last_chunks(
                identity, piece, answering.prompt_tokens, question.include_usage
            )
            for last in ends:
                yield event(last)
            self._count(begun)
            yield "data: [DONE]\n\n"
        except Refused as error:  # The status is sent already.
            self.counts[str(error.status)] += 1
            yield event(error.to_dict())

    def _count(self, begun: float) -> None:
        self.counts["200"] += 1
        self.seconds += time.monotonic() - begun


def api_key(args: Namespace) -> str | None:
    """The key that requests need, None for none. Raises UsageError where others could ask the model
    without one."""
    key = args.api_key or os.environ.get(KEY_VARIABLE)
    local = args.host in ("127.0.0.1", "localhost", "::1")
    if not (key or local or args.no_auth):
        raise UsageError(
            f"--host {args.host} lets other machines ask the model: set a key in {KEY_VARIABLE} (or"
            " --api_key, which others on this machine may see), or say --no_auth"
        )
    return key


def serve(args: Namespace) -> None:
    """Serves until a signal comes. Raises UsageError for a port in use, and what loading raises."""
    server = Server(args, api_key(args))
    Image.MAX_IMAGE_PIXELS = args.max_megapixels * 10**6
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        listening = socket.create_server((args.host, args.port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--host {args.host} --port {args.port}: cannot listen there ({reason}); choose another"
            " port"
        ) from None
    web = uvicorn.Server(
        uvicorn.Config(
            server.app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=STOP_WITHIN,
        )
    )
    failed: list[BaseException] = []

    def stop(error: BaseException) -> None:
        failed.append(error)
        web.should_exit = True

    transformers_logging.disable_progress_bar()
    server.model.load(partial(load_segmenter, args), stop)
    host = f"[{args.host}]" if family == socket.AF_INET6 else args.host
    print(f"http://{host}:{listening.getsockname()[1]}/v1", flush=True)
    with listening:
        web.run([listening])
    if failed:
        raise failed[0]


@command.entry(memory=LESS_MEMORY)
def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 with one line for a mistake in flags or files; 130 after a signal."""
    serve(read_serve(argv))
    return 0

"""Requests to the guard of the page, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import Mock

from cores.utils.serving.folder import ServedFolder
from cores.utils.serving.guard import Guard


@dataclass
class Asked:
    """A request. ``length``: what it says of its body, of which nothing comes."""

    path: str
    method: str = "GET"
    host: str | None = "127.0.0.1:7860"
    origin: str | None = None
    length: int | None = None
    body: Sequence[bytes] = (b"",)


@dataclass
class Answered:
    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""


async def page(scope: dict, receive: Any, send: Any) -> None:
    """An application that reads the whole request and says yes."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"yes"})


def guard(folder: ServedFolder, app: Any = page, **options: Any) -> Guard:
    options = {"visitors": Mock(), "most_upload": 20 * 2**20, "host": "127.0.0.1"} | options
    return Guard(app, folder=folder, **options)


def ask(folder: ServedFolder, asked: Asked, **options: Any) -> Answered:
    """What a page answers behind its guard; ``options``: as for ``guard``."""
    headers = []
    for name, value in (("host", asked.host), ("origin", asked.origin)):
        if value is not None:
            headers.append((name.encode(), value.encode()))
    if asked.length is not None:
        headers.append((b"content-length", str(asked.length).encode()))
    scope = {"type": "http", "path": asked.path, "method": asked.method, "headers": headers}
    pieces = iter(asked.body)
    got = Answered()

    async def receive() -> dict:
        piece = next(pieces, None)
        more = piece is not None
        return {"type": "http.request", "body": piece or b"", "more_body": more}

    async def send(message: dict) -> None:
        if message["type"] == "http.response.start":
            got.status, got.headers = message["status"], dict(message["headers"])
        else:
            got.body += message["body"]

    asyncio.run(guard(folder, **options)(scope, receive, send))
    return got

"""What stands before the page: who may ask, for what, and how much may be sent.

A web site that a visitor also has open must not reach a page that only this machine is meant to
reach, be it by a name that suddenly means this machine (DNS rebinding), by a request in the
visitor's name, or in a frame.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import nullcontext
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from cores.utils.serving.folder import ServedFolder, TryLater
from cores.utils.serving.visitors import Visitors

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

API = "/gradio_api"
HEARTBEAT, UPLOAD, FILE = f"{API}/heartbeat/", f"{API}/upload", f"{API}/file="
# All that the page asks for. gradio answers much more: its API and the description of it, a proxy,
# files of other servers, an editor.
PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt") + tuple(
    f"{API}/{name}"
    for name in (
        *("app_id", "cancel", "queue/data", "queue/join", "reset", "run/predict"),
        *("startup-events", "theme.css", "upload", "upload_progress"),
    )
)
FOLDERS = ("/assets/", "/static/", HEARTBEAT, FILE)
MOST_BYTES = 2**18  # of a request that is no upload
FORM_BYTES = 2**16  # what a form adds to the file in it
# gradio's page has scripts in its text and makes others from texts; nothing comes from elsewhere.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none';"
    " base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-frame-options": b"DENY",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
}
FILE_POLICY = b"default-src 'none'; sandbox; frame-ancestors 'none'"


class TooLargeError(Exception):
    """A request is longer than it may be, or than it said."""


class Guard:
    """An ASGI application around another one."""

    def __init__(
        self,
        app: Callable[[Message, Receive, Send], Awaitable[None]],
        visitors: Visitors,
        folder: ServedFolder,
        most_upload: int,
        host: str,
        names: Iterable[str] = (),
    ):
        """``most_upload``: bytes of one file. The page may be asked for by numeric addresses, which
        no name server can give another meaning, as localhost, by this machine's own name, as
        ``host``, and by further ``names``, under which other servers may pass requests on."""
        self.app, self.visitors, self.folder, self.most_upload = app, visitors, folder, most_upload
        self.names, self.given = served_names(host, names)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            raise ValueError(f"{scope['type']}: the page has no such connections")
        path, begun = scope["path"], False

        async def guarded(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                extra = HEADERS | (
                    {b"content-security-policy": FILE_POLICY} if path.startswith(FILE) else {}
                )
                headers = [(k, v) for k, v in message["headers"] if k.lower() not in extra]
                message = {**message, "headers": [*headers, *extra.items()]}
            await send(message)

        try:
            refused = self._refused(scope)
            if refused is not None:
                return await _say(guarded, *refused)
            most = MOST_BYTES
            room: Any = nullcontext()
            if path == UPLOAD:
                most = self.most_upload + FORM_BYTES
                room = self.folder.receiving(min(most, _length(scope) or most))
            if (_length(scope) or 0) > most:
                raise TooLargeError
            with room:
                await self._pass(scope, _limited(receive, most), guarded)
        except TooLargeError:
            if not begun:
                limit = f"{self.most_upload / 2**20:g} MB" if path == UPLOAD else "what is asked"
                await _say(guarded, 413, f"This is larger than {limit}.")
        except TryLater as error:
            await _say(guarded, 503, str(error))

    async def _pass(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if not path.startswith(HEARTBEAT):
            return await self.app(scope, receive, send)
        key = path.removeprefix(HEARTBEAT)  # The connection lasts as long as the page.
        self.visitors.page_opened(key)
        try:
            await self.app(scope, receive, send)
        finally:
            self.visitors.page_closed(key)

    def _refused(self, scope: Message) -> tuple[int, str] | None:
        """(status, words) for a request that is none of the page's."""
        refused = refused_site(scope, self.names, self.given)
        if refused is not None:
            return refused
        path = scope["path"]
        if path not in PAGES and not path.startswith(FOLDERS):
            return 404, "There is no such page."
        if path.startswith(FILE) and "://" in path:
            return 403, "Only files of this page are served."
        return None


def served_names(host: str, names: Iterable[str]) -> tuple[set[str], set[str]]:
    """(all names of a server that listens on ``host``, those among them that were given: ``names``)
    in small letters."""
    given = {name.lower().rstrip(".") for name in names}
    return {"localhost", socket.gethostname().lower(), host.lower()} | given, given


def refused_site(scope: Message, names: set[str], given: set[str]) -> tuple[int, str] | None:
    """(status, words) for a request under a name that is neither a number nor among ``names``, or
    by another web site; those of ``given`` may pass requests on."""
    headers = scope["headers"]
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
    if len(hosts) != 1:
        return 400, "A request needs one Host."
    name = _host(hosts[0])
    if name is None or not (_is_number(name) or name in names):
        return 403, (
            f"This server is not known under the name {hosts[0][:100]!r}; --allowed_hosts NAME"
            " allows it."
        )
    for origin in origins:
        site = origin.partition("://")[2]
        if site.lower() != hosts[0].lower() and _host(site) not in given:
            return 403, "Another web site asks, which is not answered."
    return None


def _length(scope: Message) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return None


def _host(netloc: str) -> str | None:
    """Without the port; None where it is no host."""
    try:
        parts = urlsplit(f"//{netloc}")
        _ = parts.port
    except ValueError:
        return None
    plain = parts.username is None and not parts.path and not parts.query and not parts.fragment
    return parts.hostname.rstrip(".") if plain and parts.hostname else None


def _is_number(name: str) -> bool:
    """Whether a host is a numeric address."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _limited(receive: Receive, most: int) -> Receive:
    left = most

    async def counted() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise TooLargeError
        return message

    return counted


async def _say(send: Send, status: int, words: str) -> None:
    """A whole answer of one line."""
    body = words.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

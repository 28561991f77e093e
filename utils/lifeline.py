"""A line between the ranks beside their collectives: they meet, who fails says why, and who is gone
is noticed at once, whatever the others wait for.

Every rank holds a connection to rank 0, which the system closes when its process ends, however it
ends. What comes over it is a line of JSON: the last words of a rank, which rank 0 passes on to all
others. A collective need not return for that: NCCL waits ten minutes for a peer that has died.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from cores.dataset.command import PROCESS_LOST, STOPPED

GRACE = 5.0  # seconds for a rank to end by itself, in order, once another has failed
HELLO, GREET = 2.0, 8.0  # seconds for a connection to say which rank it is, and for rank 0 to greet
GREETING = "cores"


class LastWords(NamedTuple):
    """Of a rank that ends before the others."""

    rank: int
    host: str
    code: int
    text: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.text}"

    @property
    def code_for_others(self) -> int:
        """All stop when one was asked to; otherwise the others have lost a process."""
        return STOPPED if self.code == STOPPED else PROCESS_LOST


class _Line:
    """A connection that carries lines of JSON."""

    def __init__(self, connection: socket.socket, rank: int, host: str):
        self.socket, self.rank, self.host = connection, rank, host
        self._begun = b""
        # A machine that is switched off closes nothing: the system asks it every few seconds.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)

    def send(self, message: dict[str, Any]) -> None:
        """Who is gone needs no message."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next message; None at the end of the connection. Raises TimeoutError."""
        self.socket.settimeout(seconds)
        try:
            while b"\n" not in self._begun:
                part = self.socket.recv(65536)
                if not part:
                    return None
                self._begun += part
        except TimeoutError:
            raise
        except OSError:
            return None
        line, self._begun = self._begun.split(b"\n", 1)
        try:
            message = json.loads(line)
        except ValueError:
            return None
        return message if isinstance(message, dict) else None


class Lifeline:
    """This rank's end of the line."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world, self.host = rank, world, socket.gethostname()
        self.others: list[_Line] = []
        self.leaving = False
        self._lost: LastWords | None = None
        self._told = threading.Event()
        # A data worker, which is forked, must not keep the connections of its rank open.
        os.register_at_fork(after_in_child=self._close)

    def gather(self, server: socket.socket, token: str, seconds: float, store_port: int) -> None:
        """Rank 0 waits for all others, then tells them to begin. Raises TimeoutError with the
        ranks that did not come. ``store_port``: what the others need to know to go on."""
        deadline = time.monotonic() + seconds
        here: dict[int, _Line] = {}
        refused = ""
        with server:
            while len(here) < self.world - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    line = _Line(server.accept()[0], -1, "?")
                except TimeoutError:
                    absent = ", ".join(str(r) for r in range(1, self.world) if r not in here)
                    raise TimeoutError(
                        f"rank {absent} of {self.world} did not come within {seconds:.0f} s"
                        f"{refused}"
                    ) from None
                if fault := self._admit(line, token, here):
                    line.send({"refused": fault})
                    line.socket.close()
                    refused = f" ({fault})"
                else:
                    here[line.rank] = line
                    self.others.append(line)
        self._send_all({"begin": store_port, "host": self.host})

    def _admit(self, line: _Line, token: str, here: dict[int, _Line]) -> str:
        """Why a new connection is not one of the ranks, or ""."""
        line.send({"greeting": GREETING})
        try:
            hello = line.read(HELLO) or {}
        except TimeoutError:
            hello = {}
        if hello.get("token") != token:
            return "something else than a rank came"
        line.rank, line.host = hello["rank"], hello["host"]
        if hello["world"] != self.world:
            return f"WORLD_SIZE is {hello['world']} on rank {line.rank}, {self.world} on rank 0"
        if line.rank in here:
            return f"rank {line.rank} came twice; each process needs a RANK of its own"
        return ""

    def join(self, address: str, port: int, token: str, seconds: float) -> int:
        """Any other rank connects to rank 0 and waits until all are there; returns the port of
        their store. Raises ConnectionError with what rank 0 says, or TimeoutError."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = _Line(socket.create_connection((address, port), GREET), 0, address)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"rank 0 did not come within {seconds:.0f} s") from None
                time.sleep(0.1)
        line.send({"token": token, "rank": self.rank, "world": self.world, "host": self.host})
        with contextlib.suppress(TimeoutError):
            if (line.read(GREET) or {}).get("greeting") == GREETING:
                # Rank 0 says itself who did not come.
                answer = line.read(max(0.0, deadline - time.monotonic()) + GREET) or {}
                if "begin" not in answer:
                    words = answer.get("refused") or answer.get("text") or "rank 0 has ended"
                    raise ConnectionError(words)
                line.host = str(answer["host"])
                self.others = [line]
                return int(answer["begin"])
        raise ConnectionError("what answers there is not rank 0: another program has the port")

    def watch(self) -> None:
        """From now on this process ends when another rank does."""
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def tell(self, code: int, text: str) -> None:
        """This rank ends with ``text``: the others hear it before it is gone."""
        self.leaving = True
        self._send_all({"rank": self.rank, "host": self.host, "code": code, "text": text[:2000]})

    def leave(self) -> None:
        """This rank ends in order, as all do."""
        self.leaving = True
        self._send_all({"bye": True})

    def lost(self, seconds: float) -> LastWords | None:
        """The last words of another rank; waits for them so long. Whoever asks ends by itself."""
        if self._told.wait(seconds):
            self.leaving = True
        return self._lost

    def _send_all(self, message: dict[str, Any], but: _Line | None = None) -> None:
        for line in self.others:
            if line is not but:
                line.send(message)

    def _close(self) -> None:
        self.leaving = True
        for line in self.others:
            line.socket.close()

    def _watch(self) -> None:
        for line, message in self._messages():
            if message is not None and "bye" in message:
                continue
            if message is None:
                gone = "ended without a word; it was killed, perhaps because memory ran out"
                message = {"rank": line.rank, "host": line.host, "code": PROCESS_LOST, "text": gone}
            self._send_all(message, but=line)
            self._lost = LastWords(**message)
            self._told.set()
            time.sleep(GRACE)
            if not self.leaving:
                # The main thread waits in a collective that may never return.
                prefix = "" if self._lost.code == STOPPED else "error: "
                text = f"{prefix}{self._lost}; this rank ends with it\n"
                with contextlib.suppress(OSError):
                    os.write(2, text.encode(errors="replace"))
                os._exit(self._lost.code_for_others)
            return

    def _messages(self) -> Iterator[tuple[_Line, dict[str, Any] | None]]:
        """What comes from anyone, None at an end without a farewell."""
        with selectors.DefaultSelector() as selector:
            for line in self.others:
                line.socket.settimeout(None)
                selector.register(line.socket, selectors.EVENT_READ, line)
            while selector.get_map():
                for key, _ in selector.select():
                    message = key.data.read()
                    if message is None or "bye" in message:
                        selector.unregister(key.fileobj)
                    yield key.data, message

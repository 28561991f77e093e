"""Who waits for the model: one visitor after another, in the order of arrival."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from ipaddress import ip_address

from cores.utils.serving.folder import TryLater

EACH = 2  # places of one visitor: a picture that is being read, and the first question about it
NOTICE = 2.0  # seconds after which one who waits is told again, and found to have left


@dataclass(frozen=True)
class Visitor:
    """One open page. ``key``: a random text that only this page knows; ``address``: where it is."""

    key: str
    address: str

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine, or behind a proxy on it that does not tell addresses
        apart. Limits of one address do not hold there."""
        try:
            return ip_address(self.address).is_loopback
        except ValueError:
            return False


class Line:
    """At most ``most`` places, half of them for one address. One event loop uses it."""

    def __init__(self, most: int):
        self.most = most
        self._places: list[Place] = []
        self._moved = asyncio.Event()

    def join(self, visitor: Visitor) -> Place:
        """A place at the end, to be used by ``with``. Raises TryLater where there is none."""
        others = [place.visitor for place in self._places]
        if sum(other.key == visitor.key for other in others) >= EACH:
            raise TryLater("Your last question still waits; stop it first, or wait for its answer.")
        if len(others) > self.most:  # The first one does not wait.
            raise TryLater(f"{self.most} questions wait already; try again later.")
        nearby = sum(other.address == visitor.address for other in others)
        if not visitor.is_local and nearby > self.most // 2:
            raise TryLater("Too many questions from your address wait already; try again later.")
        self._places.append(Place(self, visitor))
        return self._places[-1]

    def holds(self, key: str) -> bool:
        """Whether the visitor ``key`` waits or is served."""
        return any(place.visitor.key == key for place in self._places)

    def before(self, place: Place) -> int:
        """How many come first; 0: it is its turn."""
        return self._places.index(place)

    def leave(self, place: Place) -> None:
        if place in self._places:
            self._places.remove(place)
            moved, self._moved = self._moved, asyncio.Event()
            moved.set()

    async def move(self) -> None:
        """Returns when somebody left, or after ``NOTICE`` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._moved.wait(), NOTICE)


class Place:
    """A place in the line, given up at the end of its ``with``."""

    def __init__(self, line: Line, visitor: Visitor):
        self.line, self.visitor = line, visitor
        self.question = ""

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.line.leave(self)

    async def wait(self) -> AsyncIterator[int]:
        """Yields how many come first, whenever this changes and every few seconds, until it is
        this one's turn."""
        while before := self.line.before(self):
            yield before
            await self.line.move()

"""Who waits, in what order, and who may not."""

import asyncio
from contextlib import ExitStack

import pytest

from cores.utils.serving import line as module
from cores.utils.serving.folder import TryLater
from cores.utils.serving.line import Line, Visitor

NEAR, FAR = "127.0.0.1", "203.0.113.5"


def test_the_order_is_that_of_arrival():
    served = []

    async def visit(line: Line, key: str) -> None:
        with line.join(Visitor(key, NEAR)) as place:
            seen = [before async for before in place.wait()]
            served.append((key, seen))
            await asyncio.sleep(0.001)

    async def all_of_them() -> None:
        line = Line(10)
        await asyncio.gather(*(visit(line, key) for key in "abc"))
        assert not any(line.holds(key) for key in "abc")

    asyncio.run(all_of_them())
    assert served == [("a", []), ("b", [1]), ("c", [2, 1])]


def test_one_who_gives_up_lets_the_others_move():
    async def run() -> None:
        line = Line(10)
        with ExitStack() as first, line.join(Visitor("c", NEAR)) as last:
            del first
            assert line.before(last) == 0
            task = asyncio.ensure_future(queue(line))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not line.holds("d") and line.holds("c")

    async def queue(line: Line) -> None:
        with line.join(Visitor("d", NEAR)) as place:
            async for _ in place.wait():
                pass

    asyncio.run(run())


def test_who_waits_hears_of_it_again(monkeypatch):
    monkeypatch.setattr(module, "NOTICE", 0.001)

    async def run() -> None:
        line = Line(10)
        with line.join(Visitor("a", NEAR)), line.join(Visitor("b", NEAR)) as place:
            told = place.wait()
            assert [await anext(told) for _ in range(3)] == [1, 1, 1]
            await told.aclose()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("visitors", "words"),
    [
        ([("a", NEAR)] * 3, "Your last question still waits"),
        ([(key, NEAR) for key in "abcdef"], "4 questions wait already"),
        ([(key, FAR) for key in "abcd"], "from your address"),
        ([(key, "::ffff:203.0.113.5") for key in "abcd"], "from your address"),
        ([(key, "") for key in "abcd"], "from your address"),
    ],
)
def test_limits(visitors, words):
    line = Line(4)
    *first, last = [Visitor(*visitor) for visitor in visitors]
    for visitor in first:
        line.join(visitor)
    with pytest.raises(TryLater, match=words):
        line.join(last)
    line.join(Visitor("other", "198.51.100.7")) if words != "4 questions wait already" else None


def test_this_machine_has_no_limit_of_an_address():
    line = Line(4)
    for key in "abcde":
        line.join(Visitor(key, "::1"))

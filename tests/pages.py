"""A page without gradio: its handlers, called as gradio would call them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from cores import app
from cores.model.inference.segmenter import ReasoningSegmenter
from cores.utils.serving.folder import ServedFolder
from cores.utils.serving.line import Line, Visitor
from cores.utils.serving.visitors import Visitors
from tests.scripted import scripted_model

ANSWER = "It is [LOC] on [SEG]"


class Widgets:
    """What the handlers of the page take of gradio; it keeps what is warned of."""

    skip = staticmethod(lambda: None)
    Error = type(
        "Error", (Exception,), {"__init__": lambda self, text, **_: Exception.__init__(self, text)}
    )
    Dropdown = DownloadButton = staticmethod(dict)

    def __init__(self):
        self.warnings: list[str] = []
        self.Warning = self.warnings.append


@cache
def segmenter() -> ReasoningSegmenter:
    flags = ["--version", str(scripted_model()), "--max_new_tokens", "12"]
    return app.load_segmenter(app.read_page(flags))


class VisitorlessPage:
    """A page of the scripted model with visitors "a", "b", …, each with a picture of its own."""

    def __init__(
        self,
        parent: Path,
        most: int = 128,
        ready: int = 8,
        queue: int = 64,
        disk: int = 2**27,
        model_max_length: int = 2048,
    ):
        self.folder = ServedFolder(disk, parent)
        self.line, self.segmenter = Line(queue), segmenter()
        self.segmenter.processor.tokenizer.model_max_length = model_max_length
        self.now = 0.0
        limits = most, ready
        self.visitors = Visitors(
            self.segmenter, self.folder, self.line, *limits, clock=lambda: self.now
        )
        self.widgets = Widgets()
        self.page = app.Page(self.widgets, self.visitors)
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        self.page.close()
        self._loop.close()
        self.folder.__exit__()

    def run(self, work: Coroutine) -> Any:
        return self._loop.run_until_complete(work)

    def sent(self, seed: int = 0, size: tuple[int, int] = (48, 64)) -> str:
        """What the server calls an upload with pixels that depend on ``seed``."""
        folder = self.folder.path / f"upload-{seed}-{size}"
        folder.mkdir(exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "p.png")
        return str(folder / "p.png")

    @staticmethod
    async def exhausted(steps: AsyncIterator[tuple]) -> tuple:
        """The last of what a handler shows."""
        last: tuple = ()
        async for shown in steps:
            last = shown
        return last

    async def opened(self, key: str, seed: int = 0, address: str = "127.0.0.1") -> tuple:
        return await self.exhausted(self.page.open(Visitor(key, address), self.sent(seed)))

    def open(self, key: str, seed: int = 0, address: str = "127.0.0.1") -> tuple:
        """Drops a picture; raises AssertionError where the page warns."""
        warnings = len(self.widgets.warnings)
        shown = self.run(self.opened(key, seed, address))
        assert self.widgets.warnings[warnings:] == []
        return shown

    def asking(
        self, key: str, address: str = "127.0.0.1", question: Any = "where?"
    ) -> AsyncGenerator[tuple, None]:
        """An answer in the making."""
        return self.page.ask(Visitor(key, address), question, app.ANSWER, 45)

    async def asked(self, key: str, question: Any, address: str = "127.0.0.1") -> list[str]:
        shown = await self.exhausted(self.asking(key, address, question))
        return [message["content"] for message in shown[1] if message["role"] == "assistant"]

    def ask(self, key: str, question: Any, address: str = "127.0.0.1") -> list[str]:
        """All answers of the conversation, as shown."""
        return self.run(self.asked(key, question, address))


def fail_with(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise error

    return fail

"""What is kept of every visitor: little for as long as the page is open, and what is large for the
few who asked last.

A conversation is its picture's file, its words, and its masks as run lengths. What a model needs to
go on with it (pixels, features, KV cache: hundreds of megabytes) is made again from these for
whoever comes back.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cores.dataset.conversation.turns import Turn
from cores.dataset.files.errors import DataError
from cores.dataset.files.images import read_image
from cores.dataset.files.rle import decode_rle, encode_rle
from cores.model.inference.results import AnswerMask, Result, Stream
from cores.model.inference.segmenter import ReasoningSegmenter, Session
from cores.utils.serving.folder import ServedFolder, TryLater
from cores.utils.serving.line import Line, Place, Visitor

FORGET_AFTER = 3600  # seconds without use
FORGET_CLOSED_AFTER = 120  # seconds after its page was closed; a page that lost its way comes back
MOST_ANSWERS = 100  # of one conversation
VIEWS_KEPT = 4  # painted pictures of one conversation; a browser may still fetch the one before
REMEMBERED = 1000  # visitors of whom nothing is kept but that they were forgotten


@dataclass
class KeptAnswer:
    """An answer without pixels."""

    shell: Result
    """The answer with neither picture nor masks."""
    masks: list[tuple[dict[str, dict[str, Any]], dict[str, float]]]
    """(level name -> run lengths, level name -> predicted IoU) of every mask."""

    @classmethod
    def of(cls, result: Result) -> KeptAnswer:
        masks = [
            ({name: encode_rle(mask) for name, mask in found.levels.items()}, found.ious)
            for found in result.masks
        ]
        return cls(replace(result, image=np.zeros((0, 0, 3), np.uint8), masks=[]), masks)

    def result(self, image: np.ndarray) -> Result:
        """The answer as it was; ``image``: its picture, uint8 (H, W, 3) RGB."""
        size = image.shape[0], image.shape[1]
        masks = [
            AnswerMask(
                {name: decode_rle(rle, size, "answer", name) for name, rle in levels.items()}, ious
            )
            for levels, ious in self.masks
        ]
        return replace(self.shell, image=image, masks=masks)


@dataclass
class VisitorChat:
    """One visitor's conversation about one picture."""

    visitor: Visitor
    picture: Path
    """Alone in a folder of the conversation, where files for the visitor go, too."""
    used: float
    """When it was last asked for, by the clock of the store."""
    session: Session | None = None
    """What is large, where it is there."""
    turns: list[Turn] = field(default_factory=list)
    answers: list[KeptAnswer] = field(default_factory=list)
    asking: Place | None = None
    """Of the question that waits or is being answered, or was cut off."""
    views: deque[Path] = field(default_factory=deque)
    closed: float | None = None
    """When its page was closed, by the clock of the store."""

    @property
    def folder(self) -> Path:
        return self.picture.parent

    def image(self) -> np.ndarray:
        """uint8 (H, W, 3) RGB. Raises DataError where the file is gone."""
        session = self.session
        return read_image(self.picture) if session is None else session.image

    def answer(self, number: int | None) -> KeptAnswer | None:
        """None where there is no such answer."""
        if number is None or not 0 <= number < len(self.answers):
            return None
        return self.answers[number]

    def undo(self) -> str | None:
        """Takes the last question that is remembered back, and returns it; None where there is
        none."""
        if not self.turns:
            return None
        question = self.turns[-1][0]
        self._set_turns(self.turns[:-1])
        # An answer without words is not remembered, so such answers may come after the last one
        # that is.
        while self.answers and self.answers.pop().shell.question != question:
            pass
        return question

    def reset(self) -> None:
        """Forgets the conversation, not the picture."""
        self._set_turns([])
        self.answers = []

    def _set_turns(self, turns: list[Turn]) -> None:
        self.turns = turns
        if self.session is not None:
            self.session.turns = list(turns)

    def show(self, path: Path) -> None:
        """``path``: a painted picture, after which the oldest one goes."""
        self.views.append(path)
        while len(self.views) > VIEWS_KEPT:
            self.views.popleft().unlink(missing_ok=True)


class Visitors:
    """At most ``most`` conversations, half of them for one address, ``ready`` of them with all
    that the model needs. Threads may share it.

    Where there are too many, the one goes that was not used for longest among those whose page is
    closed, and where all pages are open a new one has to wait. So nobody loses a conversation to
    somebody else while its page is open and used within an hour.
    """

    def __init__(
        self,
        segmenter: ReasoningSegmenter,
        folder: ServedFolder,
        line: Line,
        most: int,
        ready: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.segmenter, self.folder, self.line = segmenter, folder, line
        self.most, self.ready, self.clock = most, ready, clock
        self._conversations: dict[str, VisitorChat] = {}
        self._ready: list[VisitorChat] = []  # The one that was asked last comes last.
        self._pages: Counter[str] = Counter()
        self._forgotten: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.RLock()

    def page_opened(self, key: str) -> None:
        """A page says that it is there; ``page_closed`` when it no longer does."""
        with self._lock:
            self._pages[key] += 1
            if key in self._conversations:
                self._conversations[key].closed = None

    def page_closed(self, key: str) -> None:
        with self._lock:
            self._pages[key] -= 1
            if self._pages[key] <= 0:
                del self._pages[key]
                if key in self._conversations:
                    self._conversations[key].closed = self.clock()

    def find(self, key: str) -> VisitorChat | None:
        """The conversation of the visitor ``key``, which is used now."""
        with self._lock:
            found = self._conversations.get(key)
            if found is not None:
                found.used = self.clock()
                if found.closed is not None:  # It lost its connection, not its page.
                    found.closed = self.clock()
            return found

    def knows(self, key: str) -> bool:
        """Whether the visitor ``key`` has a conversation, an open page or a place in the line."""
        return key in self._conversations or key in self._pages or self.line.holds(key)

    def everyone(self) -> list[str]:
        """All visitors with a conversation."""
        with self._lock:
            return list(self._conversations)

    def why_forgotten(self, key: str) -> str | None:
        """In words; None for a visitor without a conversation that was forgotten."""
        return self._forgotten.get(key)

    def require_place(self, visitor: Visitor) -> None:
        """Makes place for a conversation. Raises TryLater where there is none."""
        with self._lock:
            others = {k: c for k, c in self._conversations.items() if k != visitor.key}
            near = {k: c for k, c in others.items() if c.visitor.address == visitor.address}
            if not visitor.is_local and len(near) >= max(1, self.most // 2):
                self._forget_closed(near, "Too many conversations from your address are open")
            elif len(others) >= self.most:
                self._forget_closed(others, f"{self.most} conversations are open")

    def _forget_closed(self, among: dict[str, VisitorChat], trouble: str) -> None:
        closed = [k for k in among if k not in self._pages and not self.line.holds(k)]
        if not closed:
            raise TryLater(f"{trouble}; try again later.")
        self.forget(min(closed, key=lambda k: among[k].used), "others needed its place")

    def receive(self, sent: str) -> Path:
        """A file that a visitor sent, alone in a new folder that stays until the caller removes it,
        or ``open`` takes it. Raises DataError where the file is gone."""
        folder = self.folder.new()
        picture = folder / Path(sent).name
        try:
            try:
                picture.hardlink_to(sent)
            except OSError:  # Not every file system can.
                shutil.copyfile(sent, picture)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, FileNotFoundError):
                raise DataError("The picture is no longer here; send it again.") from None
            raise
        return picture

    def open(self, visitor: Visitor, picture: Path) -> VisitorChat:
        """A new conversation about what ``receive`` gave, in place of the visitor's last one.

        Raises TryLater where there is no place, DataError for a file that is no picture.
        """
        self.require_place(visitor)
        session = self.segmenter.open(picture)
        found = VisitorChat(visitor, picture, self.clock(), session)
        with self._lock:
            self.forget(visitor.key)
            self._forgotten.pop(visitor.key, None)
            self._conversations[visitor.key] = found
            self._rest_others(found)
        return found

    def stream(self, conversation: VisitorChat, question: str) -> Stream:
        """The answer in the making, as ``Session.stream`` gives it; ``keep`` it afterwards."""
        if conversation.session is None:
            session = self.segmenter.open(conversation.picture)
            session.turns = list(conversation.turns)
            conversation.session = session
        with self._lock:
            self._rest_others(conversation)
        return conversation.session.stream(question)

    def keep(self, conversation: VisitorChat, result: Result) -> None:
        """Adds a finished answer."""
        assert conversation.session is not None, "the session that gave the answer is still there"
        conversation.turns = list(conversation.session.turns)
        conversation.answers.append(KeptAnswer.of(result))

    def _rest_others(self, conversation: VisitorChat) -> None:
        """``conversation`` is asked now: of the others, only the last ones stay ready."""
        self._ready = [c for c in self._ready if c is not conversation and c.session is not None]
        self._ready.append(conversation)
        while len(self._ready) > self.ready:
            self._ready.pop(0).session = None

    def rest_all(self) -> None:
        """Gives all memory back that can be; every conversation can still go on."""
        with self._lock:
            for conversation in self._ready:
                conversation.session = None
            self._ready = []

    def forget(self, key: str, why: str | None = None) -> None:
        """Frees what is kept of a visitor, files too. ``why``: what it is told if it comes back."""
        with self._lock:
            found = self._conversations.pop(key, None)
            if found is None:
                return
            found.session = None
            self._ready = [c for c in self._ready if c is not found]
            shutil.rmtree(found.folder, ignore_errors=True)
            if why is not None:
                self._forgotten[key] = why
                while len(self._forgotten) > REMEMBERED:
                    self._forgotten.popitem(last=False)

    def sweep(self) -> None:
        """Forgets who has not been there for long, and removes what was sent and not opened."""
        with self._lock:
            now = self.clock()
            for key, found in list(self._conversations.items()):
                gone = found.closed is not None and now - found.closed > FORGET_CLOSED_AFTER
                if (gone or now - found.used > FORGET_AFTER) and not self.line.holds(key):
                    self.forget(key, "it was not used for an hour, or its page was closed")
        self.folder.sweep()

"""Large JSON files, one entry at a time.

``json.load`` of a 1 GB annotation file takes several GB of memory. This reader holds a window of a
few MB of the text (more if a single entry is larger) and lets Python's own parser, which is written
in C, decode the entries inside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from cores.dataset.files.encodings import marked_encoding
from cores.dataset.files.errors import DataError, MissingDataError, reason_of
from cores.dataset.files.paths import refuse_endless
from cores.dataset.files.text import text_encoding

WINDOW = 1 << 22  # characters
SPACE = " \t\n\r"
Result = TypeVar("Result")


class JsonReader:
    """A position in a JSON text. Its iterators share it, so take the value of a member or item
    before asking for the next."""

    def __init__(self, stream: TextIO, window: int = WINDOW):
        self._stream, self._window = stream, window
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._at, self._dropped = "", 0, 0
        self._ended = False

    def members(self) -> Iterator[str]:
        """The keys of the object that starts here; the caller takes each ``value()`` or
        ``items()``. Raises ValueError."""
        self._take("{")
        if self.peek() == "}":
            self._take("}")
            return
        while True:
            if self.peek() != '"':
                self._fail("a key in quotes is expected")
            key, _ = self.value()
            self._take(":")
            yield key
            if self._take(",}") == "}":
                return

    def items(self) -> Iterator[tuple[Any, str]]:
        """(value, its text) of each item of the list that starts here. Raises ValueError."""
        self._take("[")
        if self.peek() == "]":
            self._take("]")
            return
        while True:
            yield self.value()
            if self._take(",]") == "]":
                return

    def value(self) -> tuple[Any, str]:
        """The value that starts here and its text. Raises ValueError."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended:
                    self._fail(error.msg.removesuffix(" starting at"), error.pos)
            else:
                # A number at the end of the window may continue behind it; the parser would read
                # the beginning "1." or "1e+" as a 1.
                if self._ended or (end < len(self._text) and self._text[end] not in ".eE+-"):
                    text, self._at = self._text[self._at : end], end
                    return value, text
            self._fill()

    def peek(self) -> str:
        """The next character that is not white space, "" at the end of the text."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in SPACE:
                self._at += 1
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._fill()

    def end(self) -> None:
        """Raises ValueError if anything follows."""
        if self.peek():
            self._fail("extra data")

    def _take(self, allowed: str) -> str:
        found = self.peek()
        if not found or found not in allowed:
            self._fail(f"{' or '.join(allowed)} is expected")
        self._at += 1
        return found

    def _fill(self) -> None:
        """Drops what was read and at least doubles what is left, so that a long entry is parsed
        only a few times until all of it is in the window."""
        rest = self._text[self._at :]
        more = self._stream.read(max(self._window, len(rest)))
        self._dropped += self._at
        self._text, self._at, self._ended = rest + more, 0, not more

    def _fail(self, reason: str, at: int | None = None) -> None:
        at = self._at if at is None else at
        ending = ", where the file ends" if at >= len(self._text) else ""
        raise ValueError(f"{reason} at character {self._dropped + at}{ending}")


def parse_stream(path: str | Path, parse: Callable[[JsonReader], Result]) -> Result:
    """The result of ``parse`` for a JSON file, encoded as ``text_encoding`` says. It runs a second
    time, from the start of the file, if the file turns out not to be UTF-8.

    Raises MissingDataError or DataError naming the file.
    """
    path = Path(path)
    refuse_endless(path)
    try:
        with path.open("rb") as raw:
            encoding = marked_encoding(raw.read(4)) or "utf-8"
        try:
            with path.open(encoding=encoding, newline="") as stream:
                return parse(JsonReader(stream))
        except UnicodeDecodeError:
            encoding = text_encoding(path, path.read_bytes())
        with path.open(encoding=encoding, newline="") as stream:
            return parse(JsonReader(stream))
    except FileNotFoundError:
        raise MissingDataError(
            f"{path}: does not exist; check --dataset_dir and the names of the data sets"
        ) from None
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not valid JSON ({reason_of(error)}); repair or remove the file"
        ) from None

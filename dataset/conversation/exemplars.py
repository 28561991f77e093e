"""In-context guidance: plain question-answer turns that tell where things are, drawn anew for
every sample.

An exemplar shows the model the way to reason ("it typically appears on the side of the kettle"),
never a mask: it holds no special token, belongs to no image and is not supervised. The released
CoReS uses one fixed exemplar; the paper draws from a library.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from cores.dataset.files.errors import DataError
from cores.dataset.files.text import read_json

LIBRARY_PATH = Path(__file__).with_name("exemplars.json")
LOOKS_SPECIAL = re.compile(r"\[[A-Z_]+\]|<[^<>]*>|\{|\}")


def normalise(text: str) -> str:
    """The words of ``text`` in lower case with single spaces between them, so that texts become
    equal that differ only in punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


class ExemplarLibrary:
    """The checked content of a JSON list of {"q": question, "a": answer}."""

    def __init__(self, path: str | Path = LIBRARY_PATH):
        """Raises DataError naming the entry that is not two clean texts or repeats a question."""
        self.path = Path(path)
        entries = read_json(path)
        if not isinstance(entries, list) or not entries:
            raise DataError(f'{path}: must be a non-empty list of {{"q": …, "a": …}}')
        self.pairs = [self._check(entry, index) for index, entry in enumerate(entries)]
        self._questions = [normalise(question) for question, _ in self.pairs]
        first: dict[str, int] = {}
        for index, question in enumerate(self._questions):
            if first.setdefault(question, index) != index:
                raise DataError(
                    f"{path}: entry {index} asks the same question as entry {first[question]};"
                    " remove one"
                )

    def _check(self, entry: object, index: int) -> tuple[str, str]:
        texts = []
        for key in ("q", "a"):
            text = entry.get(key) if isinstance(entry, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise DataError(f'{self.path}: entry {index} needs non-empty texts "q" and "a"')
            if found := LOOKS_SPECIAL.search(text):
                raise DataError(
                    f"{self.path}: entry {index} contains {found[0]!r}; exemplars are plain text"
                )
            texts.append(text.strip())
        return texts[0], texts[1]

    def __len__(self) -> int:
        return len(self.pairs)

    def draw(
        self, rng: np.random.Generator, count: int, exclude_query: str | Sequence[str] | None = None
    ) -> list[tuple[str, str]]:
        """``count`` different (question, answer) pairs; none asks what a query in ``exclude_query``
        asks.

        Raises ValueError if the library is too small.
        """
        if count <= 0:
            return []
        queries = [exclude_query] if isinstance(exclude_query, str) else exclude_query or ()
        queries = [f" {normalise(query)} " for query in queries]
        # A query stands inside a wording ("… Please output segmentation mask."), so an exemplar
        # repeats it if it is contained in it, not only if the two are equal.
        allowed = [
            index
            for index, question in enumerate(self._questions)
            if not any(f" {question} " in query for query in queries)
        ]
        if count > len(allowed):
            raise ValueError(
                f"{self.path}: {count} exemplars wanted, only {len(allowed)} to draw from; lower"
                " --exemplar_count"
            )
        return [self.pairs[i] for i in rng.choice(allowed, size=count, replace=False)]


@cache
def default_library() -> ExemplarLibrary:
    """The library that comes with the code, read once."""
    return ExemplarLibrary()


def draw_exemplars(
    rng: np.random.Generator, count: int, exclude_query: str | Sequence[str] | None = None
) -> list[tuple[str, str]]:
    """Draws from the library that comes with the code, see ``ExemplarLibrary.draw``."""
    return default_library().draw(rng, count, exclude_query) if count > 0 else []

"""How loaders turn annotations into questions: which wordings are asked, and in which sentence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from cores.dataset.conversation.turns import Conversation
from cores.dataset.conversation.wordings import (
    answer,
    explain_question,
    phrase_question,
    sentence_question,
)
from cores.dataset.sample import LoaderOptions, draw_queries

Id = TypeVar("Id", bound=object)


def as_wordings(value: Any) -> list[str]:
    """A text, or a list of several wordings, as a list; an empty one if ``value`` is neither or any
    text is blank."""
    texts = [value] if isinstance(value, str) else value
    sound = isinstance(texts, list) and all(isinstance(t, str) and t.strip() for t in texts)
    return texts if sound else []


def readable_name(text: str) -> str:
    """A category's name in words: "baseball_bat" -> "baseball bat", and without what LVIS adds in
    brackets, "car_(automobile)" -> "car"."""
    plain = re.sub(r"_\([^)]*\)", "", text).replace("_", " ")
    return " ".join(plain.split()) or text


def readable_names(names: dict[Id, str]) -> dict[Id, str]:
    """Category id -> its readable name. Where several would get the same one, the brackets stay:
    "bat (animal)"."""
    found = {number: readable_name(name) for number, name in names.items()}
    counts = Counter(found.values())
    return {
        number: name if counts[name] == 1 else " ".join(names[number].replace("_", " ").split())
        for number, name in found.items()
    }


def choose_wordings(
    queries: Sequence[Sequence[str]], options: LoaderOptions, rng: np.random.Generator
) -> list[tuple[int, str]]:
    """(index of a query, one of its wordings) pairs. In training some are drawn; otherwise
    ``options.texts`` says whether it is the first wording of every query or all of them.

    ``queries``: the wordings of each query of an image.
    """
    if options.training:
        return draw_queries(queries, options.num_classes_per_sample, rng)
    count = 1 if options.texts == "first" else None
    return [(number, text) for number, texts in enumerate(queries) for text in texts[:count]]


def word_question(
    text: str,
    is_phrase: bool,
    explanations: Sequence[str],
    options: LoaderOptions,
    rng: np.random.Generator,
) -> tuple[str, str | None]:
    """(question, explanation to answer with or None). A query with known ``explanations`` asks for
    one with the probability ``options.explanatory``."""
    if explanations and rng.random() < options.explanatory:
        explanation = explanations[int(rng.integers(len(explanations)))]
        text = f"What is {text} in this image?" if is_phrase else text
        return explain_question(text, rng), explanation
    wording = options.wording(rng)
    return (phrase_question if is_phrase else sentence_question)(text, wording), None


def phrase_conversation(
    phrase: str,
    target: np.ndarray,
    options: LoaderOptions,
    rng: np.random.Generator,
    ignore: np.ndarray | None = None,
    host: np.ndarray | None = None,
) -> Conversation:
    """One question for ``phrase`` ("the dog") with one target. Masks are bool (H, W)."""
    wording = options.wording(rng)
    turn = phrase_question(phrase, wording), answer(options.levels, wording)
    ignore = ignore if ignore is not None and ignore.any() else None
    return Conversation([turn], target[None], ignore, None if host is None else host[None])

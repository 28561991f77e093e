"""What generated texts must keep to. Every check returns the reason of a refusal or None; a reason
is one line that can be sent back to the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from cores.dataset.conversation.exemplars import LOOKS_SPECIAL, normalise

NEARLY_THE_SAME = 0.8  # two texts with more than this share of words in common say the same

# What gives away that somebody drew the answer, or where it is. The picture itself may show a mask
# or a label, but a question that needs a thought can do without these words.
_LEAKS = [
    r"\b(masks?|masked|pixels?|bbox\w*|bounding|polygons?|coordinates?|segment\w*|annotat\w*|labell?ed|outlined|highlighted)\b",
    (
        r"\b(marked|listed|important) (objects?|items?)\b|\baccording to the"
        r" (summary|description|caption|list)\b|\bthe summary\b"
    ),
    r"[(\[{]\s*-?\d",
    r"\b\d+(\.\d+)?\s*(%|percent\b|px\b)",
    r"\b0?\.\d+",
    r"\b[xy]\d?\s*[=:]\s*-?\d",
    r"\b\d{2,4}\s*[,x×]\s*\d{2,4}\b",
    r"\b(top|upper|bottom|lower)[- ](left|right)\b",
    (
        r"\b(left|right|top|bottom|cent(er|re)|middle|side|half|corner|edge) of the"
        r" (image|picture|photo\w*|frame|scene|view)\b"
    ),
]
_LEAK = re.compile("|".join(f"(?:{leak})" for leak in _LEAKS), re.IGNORECASE)
_IRREGULAR = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "feet": "foot",
    "teeth": "tooth",
    "mice": "mouse",
    "geese": "goose",
}
# Words that say which one is meant: another wording must keep them.
_TELLING = set(
    normalise(
        "red orange yellow green blue purple pink brown black white grey gray golden silver left"
        " right top bottom upper lower front back middle first second third last largest smallest"
        " biggest tallest no not never without except two three four five six both"
    ).split()
)


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in a reply, also where words or a code fence stand around it. Raises
    ValueError with the reason."""
    for match in re.finditer(r"\{", text):
        try:
            found, _ = json.JSONDecoder().raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        return found
    raise ValueError("the reply holds no whole JSON object")


def parse_list(text: str, finish: str, name: str) -> list[Any]:
    """The list ``name`` of the JSON object in a reply. Raises ValueError with the reason."""
    if finish == "length":
        raise ValueError("the reply was cut off; be brief")
    # These two are refused by name, as servers have several words for a normal end.
    if finish in ("content_filter", "refusal"):
        raise ValueError(f"the reply ended with {finish}")
    found = parse_object(text).get(name)
    if not isinstance(found, list):
        raise ValueError(f'the reply has no list "{name}"')
    return found


def check_length(text: Any, least: int, most: int, what: str) -> str | None:
    """A text of one line with ``least`` to ``most`` words."""
    if not isinstance(text, str) or not text.strip():
        return f"the {what} is missing"
    if "\n" in text.strip():
        return f"the {what} has several lines"
    count = len(text.split())
    if not least <= count <= most:
        few = "too few" if count < least else "too many"
        return f"the {what} has {few} words ({least} to {most} are wanted)"
    return None


def check_plain(text: str, what: str) -> str | None:
    """No special token, tag, brace or character that is not printed."""
    if LOOKS_SPECIAL.search(text) or not text.isprintable():
        return f"the {what} is not plain text"
    return None


def check_leak(question: str) -> str | None:
    """Nothing about masks, boxes, coordinates, annotations or the place in the frame."""
    if found := _LEAK.search(question):
        return f'the question gives away where the answer is or that it was marked ("{found[0]}")'
    return None


def _forms(word: str) -> set[str]:
    """The word and what it may be the plural of."""
    forms = {word, _IRREGULAR.get(word, word)}
    if word.endswith("s"):
        forms.add(word[:-1])
    if word.endswith("es"):
        forms.add(word[:-2])
    if word.endswith("ies"):
        forms.add(word[:-3] + "y")
    if word.endswith("ves"):
        forms |= {word[:-3] + "f", word[:-3] + "fe"}
    return forms


def contains_name(text: str, name: str) -> bool:
    """True if ``text`` calls the thing by ``name``, in singular or plural, in one word or two; of a
    name of several words the last one is enough ("table" for "dining table")."""
    words = normalise(text).split()
    words += [a + b for a, b in pairwise(words)]  # "wine glass" for "wineglass"
    parts = normalise(name).split()
    if not parts:
        return False
    wanted = _forms(parts[-1]) | _forms("".join(parts))
    return any(_forms(word) & wanted for word in words)


def check_unnamed(question: str, all_names: Iterable[str]) -> str | None:
    """The question does not call its object by name."""
    found = next((name for name in all_names if contains_name(question, name)), None)
    return f'the question names its object ("{found}")' if found else None


def check_answer_names(answer: str, all_names: Iterable[str]) -> str | None:
    """The answer does call it by name."""
    if any(contains_name(answer, name) for name in all_names):
        return None
    return "the answer does not name its object"


def check_new(text: str, others: Iterable[str], what: str) -> str | None:
    """``text`` is not nearly the same as any of ``others``."""
    text = normalise(text)
    words = set(text.split())
    for other in map(normalise, others):
        found = set(other.split())
        if text == other or len(words & found) / len(words | found) > NEARLY_THE_SAME:
            return f"the {what} nearly repeats another one"
    return None


def check_different(text: str, others: Iterable[str], what: str) -> str | None:
    """``text`` differs from all ``others`` in more than punctuation."""
    return f"the {what} repeats another one" if normalise(text) in map(normalise, others) else None


def check_telling_words(wording: str, original: str) -> str | None:
    """Colours, sides, ranks, numbers and negations of the original are still there."""
    lost = sorted(set(normalise(original).split()) & _TELLING - set(normalise(wording).split()))
    return f'the wording loses a word that matters ("{lost[0]}")' if lost else None


def check_exemplar(question: Any, answer: Any, library: Sequence[str]) -> str | None:
    """What the library of exemplars asks of an entry. ``library``: "question answer" of all
    others."""
    reason = check_length(question, 4, 20, "question") or check_length(answer, 8, 40, "answer")
    if reason:
        return reason
    if not question.endswith("?"):
        return "the question does not end with a question mark"
    if len(re.findall(r"[.](?:\s|$)", answer)) != 2 or not answer.endswith("."):
        return "the answer is not two sentences, where it appears and what it is"
    both = f"{question} {answer}"
    if not both.isascii() or set("[]<>{}") & set(both):
        return "the texts are not plain ASCII"
    return check_plain(both, "pair") or check_leak(both) or check_new(both, library, "pair")

"""The query that every form of a user's own data becomes: its texts, its image and the shapes of
its masks. The functions check single fields and raise DataError."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cores.dataset.conversation.wordings import is_sentence
from cores.dataset.files.errors import DataError
from cores.dataset.readers.own.arrow import TableImage
from cores.dataset.readers.questions import as_wordings

# Fields of images and annotations that are asked; refCOCO and its like write the plural.
_SINGULAR = ("query", "caption", "expression", "sentence", "phrase", "question", "prompt", "text")
TEXT_KEYS = (*_SINGULAR, "queries", *(f"{name}s" for name in _SINGULAR[1:]))
TEXT_KEYS += ("referring_expression", "referring_expressions", "sent", "sents")
# How PNG and TIFF begin. Hugging Face datasets store a mask without a file of its own as either.
LOSSLESS = (b"\x89PNG", b"II*\0", b"MM\0*")
LOSSLESS_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
DETERMINER = re.compile(
    r"(the|a|an|this|that|these|those|all|any|each|every|both|some|his|her|its)(\s|$)",
    re.IGNORECASE,
)
Shape = tuple[str, Any, str]
"""(kind, value, item to blame for it) with one of "polygons" and flat lists, "rle" and {"size",
"counts"}, "png" and a file name, "labelme" and one shape, and, alone as a target, "painted" and
labelme shapes, targets and ignored regions."""


@dataclass
class OwnQuery:
    """What is asked about one image of a user's own data."""

    item: str
    """Where it is written, as errors and skip lists name it: "…/train.jsonl:12"."""
    image: str
    """Name of the image, as the file gives it."""
    texts: list[str]
    """Wordings of the same query."""
    targets: list[list[Shape]]
    """The shapes of each target, which is their union; a target without a shape is empty."""
    ignore: list[Shape] = field(default_factory=list)
    answer: str | None = None
    """An explanation that follows the mask."""
    is_sentence: bool | None = None
    split: str = ""
    size: tuple[int, int] | None = None
    """(H, W) that the file claims."""
    source: str = ""
    """The item that claims it, where it is not ``item``."""
    is_lost: bool = False
    """Whether it is a part that cannot be used, of the query with these texts about this image,
    which must not be asked without it."""
    hint: str = ""
    """What to add where the image is missing."""

    entry: str = ""
    """The entry of its image, in files where every image has one of its own."""

    def drawn(self) -> list[list[tuple[str, Any]]]:
        """The shapes of each target without the items to blame."""
        return [[(kind, value) for kind, value, _ in target] for target in self.targets]


def same_words(texts: Iterable[str]) -> tuple[str, ...]:
    """The same for wordings that differ in upper and lower case only."""
    return tuple(text.casefold() for text in texts)


def wordings_of(value: Any, where: str, name: str) -> list[str]:
    """A text or a list of several wordings as a list, each in one line."""
    texts = as_wordings(value)
    if not texts:
        raise DataError(
            f'{where}: "{name}" must be a text, or a list of wordings, none of them empty'
        )
    return [" ".join(text.split()) for text in texts]


def unread_texts(entries: Iterable[Any], read: Container[str], where: str) -> Iterator[str]:
    """A line for each field, other than those in ``read``, that holds words in some of the
    ``entries`` and would be ignored."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        for name, value in entry.items() if isinstance(entry, dict) else ():
            if name not in read:
                text = value[0] if isinstance(value, list) and value else value
                if isinstance(text, dict):
                    text = next((v for v in text.values() if isinstance(v, str)), None)
                # Names, dates and codes have no two words.
                if isinstance(text, str) and re.search(r"[^\W\d_]\s+[^\W\d_]", text):
                    found.setdefault(name, []).append(text)
    for name, texts in found.items():
        shown = " ".join(texts[0].split())[:40]
        yield (
            f'{where}: {len(texts)} have a text in "{name}" ("{shown}"), which is not asked; call'
            ' it "query" to ask it'
        )


def optional_field(entry: dict, name: str, kind: type, where: str, what: str) -> Any:
    """The field, or None where it is missing. ``what`` says in the error what it must be."""
    value = entry.get(name)
    is_blank = isinstance(value, str) and not value.strip()
    if value is not None and (is_blank or not isinstance(value, kind)):
        raise DataError(f'{where}: "{name}" must be {what}, or be left out')
    return value


def png_of(value: Any, where: str, name: str) -> str:
    """The name of a mask's file, or a TableImage whose bytes are those of a lossless format."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'{where}: "{name}" must be the name of a PNG')
    if isinstance(value, TableImage):
        if not value.open().read(4).startswith(LOSSLESS):
            raise DataError(
                f'{where}: "{name}" is no PNG; a mask must be one (other formats change pixels)'
            )
    elif not value.lower().endswith(LOSSLESS_SUFFIXES):
        raise DataError(
            f'{where}: "{name}" is {value!r}; a mask must be a PNG (other formats change pixels)'
        )
    return value


def with_article(text: str) -> str:
    """ "dog" -> "the dog"; a text that begins with a determiner, is a sentence or is written in
    another script stays."""
    letter = next(filter(str.isalpha, text), "a")
    is_latin = unicodedata.name(letter, "").startswith("LATIN")
    stays = is_sentence(text) or DETERMINER.match(text) or not is_latin
    return text if stays else f"the {text}"

"""Letters for pictures. DejaVu Sans, which comes with matplotlib, has Latin, Greek, Cyrillic,
Hebrew, Arabic and more, the same on every machine. For other scripts a font of this machine is
taken; where none has a letter, its code is drawn instead, "⟨8D64⟩", and a warning says what to
install. Nothing is drawn as an empty box."""

from __future__ import annotations

import bisect
import logging
import unicodedata
from array import array
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path

from fontTools.ttLib import TTCollection, TTFont, TTLibError
from PIL import ImageDraw, ImageFont

logger = logging.getLogger(__name__)

Place = tuple[str, int]
"""A font: its file, and its number there, as a collection holds several."""
HAS_ALL = "fonts-noto-core and fonts-noto-cjk on Debian and Ubuntu; any font in ~/.fonts"


class Face:
    """A text face of one size, in which any text can be measured and drawn."""

    def __init__(self, size: int, bold: bool = False):
        """``size``: pixels of an em."""
        self.size = size
        name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
        import matplotlib  # It takes half a second, and most commands draw nothing.

        self._own = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)

    def getlength(self, text: str) -> float:
        """The width of ``text`` in pixels."""
        return sum(_loaded(place, self.size).getlength(run) for place, run in self._runs(text))

    def draw(
        self, draw: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, colour: tuple
    ) -> None:
        """Draws one line from the top left corner ``xy`` (x, y)."""
        x, y = xy
        line = _loaded((self._own, 0), self.size).getmetrics()[0]
        for place, run in self._runs(text):
            face = _loaded(place, self.size)
            # All runs stand on the same line, whatever the ascent of their font.
            draw.text((x, y + line), run, font=face, fill=colour, anchor="ls")
            x += face.getlength(run)

    def _runs(self, text: str) -> list[tuple[Place, str]]:
        """(font, text) in the order in which they are drawn."""
        own = (self._own, 0)
        if all(_has(own, c) for c in text):
            return [(own, text)]
        pairs: list[tuple[Place, str]] = []
        for c in text:
            before = pairs[-1][0] if pairs else own
            if _has(before, c):  # A mark or a space stays with the letters around it.
                pairs.append((before, c))
            elif _has(own, c):
                pairs.append((own, c))
            elif _is_invisible(c):
                continue
            elif other := _font_with(c):
                pairs.append((other, c))
            else:
                pairs.append((own, f"⟨{ord(c):04X}⟩"))
        return [
            (place, "".join(c for _, c in run)) for place, run in groupby(pairs, key=lambda p: p[0])
        ]


def _is_invisible(c: str) -> bool:
    """Joiners and variation selectors, which only change how their neighbours look."""
    return unicodedata.category(c) == "Cf" or 0xFE00 <= ord(c) <= 0xFE0F


@lru_cache(maxsize=64)
def _loaded(place: Place, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(place[0], size, index=place[1])


def _has(place: Place, c: str) -> bool:
    letters = _letters(place)
    at = bisect.bisect_left(letters, ord(c))
    return at < len(letters) and letters[at] == ord(c)


@cache
def _letters(place: Place) -> array:
    """The code points that a font has, ascending; none for a file that is no font, or whose
    letters are pictures of one size."""
    path, number = place
    try:
        with TTFont(path, fontNumber=number, lazy=True) as found:
            pictures = {"CBDT", "sbix", "COLR", "SVG "} & set(found.keys())
            return array("I", () if pictures else sorted(found.getBestCmap() or ()))
    except (TTLibError, OSError, ValueError, KeyError, AssertionError):
        return array("I")


@lru_cache(maxsize=1)
def _fonts_of_this_machine() -> list[Place]:
    """The upright, regular ones first, of Noto before others."""

    def rank(path: str) -> tuple:
        name = Path(path).stem.lower()
        return "regular" not in name, "sans" not in name, "noto" not in name, name

    found: list[Place] = []
    from matplotlib import font_manager

    for path in sorted(font_manager.findSystemFonts(), key=rank):
        count = 1
        if path.lower().endswith((".ttc", ".otc")):
            try:
                count = len(TTCollection(path, lazy=True).fonts)
            except (TTLibError, OSError):
                continue
        found += [(path, number) for number in range(count)]
    return found


@lru_cache(maxsize=4096)
def _font_with(c: str) -> Place | None:
    """A font of this machine that has the letter. The first letter that none has is told."""
    place = next((place for place in _fonts_of_this_machine() if _has(place, c)), None)
    if place is None and not _missed:
        _missed.append(c)
        logger.warning(
            "no font here has %s (%s); the codes of such letters are drawn. Install one: %s",
            c,
            unicodedata.name(c, f"U+{ord(c):04X}"),
            HAS_ALL,
        )
    return place


_missed: list[str] = []

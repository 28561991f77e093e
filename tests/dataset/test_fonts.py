"""Texts in every script: drawn with a font of the machine that has them, or as codes; never as
empty boxes."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image, ImageDraw

from cores.dataset import fonts
from cores.dataset.fonts import Face

LETTER = "赤"


@pytest.fixture
def fonts_of_the_machine(monkeypatch):
    """A function that says which fonts the machine has, whatever it has."""

    def have(*paths: Path) -> None:
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(map(str, paths)))
        for cached in (fonts._fonts_of_this_machine, fonts._font_with):
            cached.cache_clear()
        fonts._missed.clear()

    yield have
    fonts._fonts_of_this_machine.cache_clear()
    fonts._font_with.cache_clear()


def one_letter_font(path: Path) -> Path:
    """A font whose only letter is a black square."""
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(LETTER): "square"})
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def drawn(text: str, size: int = 20) -> np.ndarray:
    """bool (30, 300): ink."""
    picture = Image.new("L", (300, 30), 255)
    Face(size).draw(ImageDraw.Draw(picture), (0, 0), text, (0,))
    return np.array(picture) < 128


def test_a_letter_is_drawn_with_the_font_that_has_it(tmp_path, fonts_of_the_machine):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    fonts_of_the_machine(broken, one_letter_font(tmp_path / "Square-Regular.ttf"))
    ink = drawn(LETTER)
    assert ink.sum() == 16 * 16  # 0.8 em wide and high
    assert drawn(f"a{LETTER}b").sum() == drawn("a").sum() + drawn("b").sum() + 16 * 16
    assert Face(20).getlength(f"a{LETTER}") == Face(20).getlength("a") + 20


def test_a_letter_that_no_font_has_is_its_code_and_told_once(fonts_of_the_machine, caplog):
    fonts_of_the_machine()
    assert np.array_equal(drawn(f"a {LETTER}"), drawn("a ⟨8D64⟩"))
    drawn("箱")
    assert len(caplog.records) == 1 and "fonts-noto-cjk" in caplog.text


def test_latin_greek_cyrillic_hebrew_and_arabic_need_no_other_font(fonts_of_the_machine, caplog):
    fonts_of_the_machine()
    own = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    for text in ("Größe", "κόκκινο", "где коробка?", "היכן", "أين الصندوق؟"):
        assert {place for place, _ in Face(20)._runs(text)} == {(str(own), 0)}
    assert not caplog.records


def test_joiners_and_variation_selectors_are_not_drawn(fonts_of_the_machine):
    fonts_of_the_machine()
    assert np.array_equal(drawn("a\u200d\ufe0fb"), drawn("ab"))

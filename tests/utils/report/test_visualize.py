"""Pictures: the right pixels are tinted, texts fit, and a sheet can be drawn for whatever an
evaluation meets."""

import numpy as np
import pytest
from PIL import Image

from cores.dataset import drawing
from cores.dataset.drawing import fit, overlay, printable, wrap
from cores.dataset.fonts import Face
from cores.utils.report import visualize
from cores.utils.report.visualize import Example, contact_sheet, draw_row


def example(size=(40, 60), levels=("LOC", "SEG"), emitted=True, **changes) -> Example:
    image = np.full((*size, 3), 100, np.uint8)
    target = np.zeros(size, dtype=bool)
    target[10:20, 10:30] = True
    masks = np.stack([target] * len(levels)) if emitted else None
    fields = {
        "image": image,
        "query": "the wheel of the bus",
        "answer": "It is [SEG].",
        "levels": list(levels),
        "masks": masks,
    }
    return Example(**fields | {"target": target, "ignore": None, "name": "toy 1"} | changes)


def test_overlay_tints_the_mask_and_nothing_else():
    item = example()
    out = overlay(item.image, item.target, (200, 0, 50), alpha=0.25, contour=0)
    assert (out[item.target] == [125, 75, 88]).all()  # 0.75 · 100 + 0.25 · colour, rounded
    assert (out[~item.target] == 100).all()
    assert (item.image == 100).all(), "the image itself is left alone"


def test_the_outline_stays_outside_the_mask():
    item = example()
    plain, outlined = (overlay(item.image, item.target, (200, 0, 50), contour=c) for c in (0, 2))
    assert (plain[item.target] == outlined[item.target]).all()
    changed = (outlined != item.image).any(-1) & ~item.target
    assert changed.any()
    rows, columns = np.nonzero(changed)
    assert rows.min() >= 10 - 4 and rows.max() <= 19 + 4
    assert columns.min() >= 10 - 4 and columns.max() <= 29 + 4


def test_overlay_refuses_a_mask_of_another_size():
    with pytest.raises(ValueError, match="differ in size"):
        overlay(example().image, np.zeros((2, 2), dtype=bool), (0, 0, 0))


@pytest.mark.parametrize("size", [(40, 60), (600, 500), (1, 300)])
def test_fit_keeps_the_shape_and_the_kind(size):
    image, mask = fit(np.zeros((*size, 3), np.uint8), 256), fit(np.ones(size, dtype=bool), 256)
    assert max(image.shape[:2]) == 256
    assert image.shape[:2] == mask.shape
    assert mask.dtype == bool
    assert mask.all()


def test_lines_fit_their_width():
    face = Face(14)
    for text in ("the wheel of a red bus " * 20, "x" * 500, "Größe, 猫 и ещё — naïve", ""):
        lines = wrap(text, face, 200, max_lines=3)
        assert len(lines) <= 3
        assert all(face.getlength(line) <= 200 for line in lines)
    assert wrap("one two", face, 200) == ["one two"]
    assert wrap("word " * 200, face, 200, max_lines=2)[-1].endswith("…")
    assert "".join(wrap("y" * 60, face, 200)) == "y" * 60, "a long word is broken, not lost"


def test_control_characters_do_not_reach_the_picture():
    assert printable("a\tb\n\x00c\u200b  d") == "a b c d"


def test_level_colours_differ_and_the_answer_keeps_its_own():
    for count in (1, 2, 3, 4):
        colours = [drawing.level_colour(level, count) for level in range(count)]
        assert len(set(colours)) == count
        assert colours[-1] == drawing.FINAL_COLOUR
        assert visualize.GROUND_TRUTH_COLOUR not in colours


@pytest.mark.parametrize("levels", [("SEG",), ("LOC", "SEG"), ("LOC", "PART", "SEG")])
def test_a_row_has_a_tile_for_every_level(levels):
    row = draw_row(example(levels=levels), tile=64)
    assert row.width == (len(levels) + 3) * 64 + (len(levels) + 2) * visualize.GAP


def test_an_answer_without_masks_shows_no_mask():
    tile = dict(visualize.panels(example(emitted=False), 64))["[SEG]  not emitted"]
    assert (tile == 236).all()


def test_captions_say_the_score_of_the_answer():
    captions = [caption for caption, _ in visualize.panels(example(), 64)]
    assert captions == ["image", "[LOC]", "[SEG]  IoU 100", "ground truth", "compared"]
    empty = example(masks=np.zeros((2, 40, 60), dtype=bool))
    assert visualize.panels(empty, 64)[2][0] == "[SEG]  IoU 0  (empty)"


def test_ignored_pixels_are_shown_grey():
    ignore = np.zeros((40, 60), dtype=bool)
    ignore[30:, :] = True
    truth = visualize.panels(example(ignore=ignore), 60)[-1][1]
    assert (truth[35, 30] == round(0.3 * 100 + 0.7 * 120)).all()


def test_contact_sheet_holds_every_example(tmp_path):
    examples = [
        example(),
        example(size=(500, 300), emitted=False),
        example(query="long " * 100, levels=("LOC", "PART", "SEG")),
    ]
    path = contact_sheet(examples, tmp_path / "new" / "sheet.png", "a title " * 40, tile=64)
    sheet = Image.open(path)
    assert sheet.format == "PNG"
    rows = [draw_row(item, 64) for item in examples]
    assert sheet.width == max(row.width for row in rows) + 2 * visualize.MARGIN
    assert sheet.height > sum(row.height for row in rows)
    pixels = np.asarray(sheet)
    top = sheet.height - rows[-1].height - visualize.MARGIN
    assert (
        pixels[top : top + rows[-1].height, visualize.MARGIN : -visualize.MARGIN]
        == np.asarray(rows[-1])
    ).all()
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


def test_a_sheet_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no example"):
        contact_sheet([], tmp_path / "sheet.png")


def test_every_pixel_of_a_comparison_says_whether_it_is_right():
    target, mask, ignore = (np.zeros((4, 4), bool) for _ in range(3))
    target[:2], mask[1:3], ignore[:, 3] = True, True, True
    tile = visualize.errors(np.full((4, 4, 3), 90, np.uint8), mask, target, ignore, 4)
    rows = (visualize.MISSED_COLOUR, visualize.HIT_COLOUR, visualize.WRONG_COLOUR, (109, 109, 109))
    for row, colour in zip(tile, rows, strict=True):
        assert (row[:3] == colour).all() and (row[3] == 109).all()
    nothing = visualize.errors(np.full((4, 4, 3), 90, np.uint8), None, target, None, 4)
    assert (nothing[:2] == visualize.MISSED_COLOUR).all() and (nothing[2:] == 109).all()

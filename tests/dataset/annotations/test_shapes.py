"""Spellings of shapes, and shapes in another frame than their image."""

import numpy as np
import pytest

from cores.dataset.annotations.masks import annotation_mask, draw_shape, paint_shapes
from cores.dataset.annotations.shapes import outline, polygons_of, refuse_misplaced, rle_of
from cores.dataset.files.errors import DataError

SIZE = (64, 96)
BOX = [[10, 12], [40, 12], [40, 44], [10, 44]]
FLAT = [float(value) for point in BOX for value in point]


@pytest.mark.parametrize(
    "spelling",
    [
        [FLAT],
        FLAT,
        BOX,
        [BOX],
        [{"x": x, "y": y} for x, y in BOX],
        [[{"x": x, "y": f"{y}", "id": 3} for x, y in BOX]],
        [[f"{value}" for value in FLAT]],
        [[[f"{x}", y] for x, y in BOX]],
    ],
    ids=range(8),
)
def test_one_polygon_in_any_spelling(spelling):
    assert polygons_of(spelling, "file", "polygons") == [FLAT]
    found = annotation_mask(spelling, SIZE, "file", "field")
    assert np.array_equal(found, annotation_mask([FLAT], SIZE, "file", "field"))
    assert found.sum() == 30 * 32


@pytest.mark.parametrize(
    ("kind", "points"),
    [
        (None, BOX),
        (" Polygon", BOX),
        ("rectangle", [BOX[2], BOX[0]]),
        ("rectangle", BOX),
        ("rotation", BOX),
        ("quadrilateral", [{"x": x, "y": y} for x, y in BOX]),
    ],
)
def test_one_rectangle_in_any_shape(kind, points):
    shape = {"label": "target", "shape_type": kind, "points": points}
    mask = draw_shape(shape, SIZE, "file")
    assert mask.sum() == 31 * 33 and mask[12:45, 10:41].all()
    assert np.array_equal(paint_shapes([shape], SIZE)[0], mask)


@pytest.mark.parametrize(
    ("kind", "count", "message"),
    [
        ("point", 1, "'point' has no area; draw a polygon"),
        ("linestrip", 4, "'linestrip' has no area"),
        ("rectangle", 3, "a rectangle has 2 or 4 points, found 3"),
        ("circle", 4, "a circle has 2 points, found 4"),
        ("rotation", 2, "a rotation has 4 points, found 2"),
        ("polygon", 2, "a polygon has at least 3 points, found 2"),
        ("ellipse", 3, "the \"shape_type\" 'ellipse' is not known"),
        (7, 4, 'the "shape_type" 7 is not known'),
    ],
)
def test_a_shape_without_area_is_named(kind, count, message):
    with pytest.raises(DataError, match=message):
        outline({"label": "x", "shape_type": kind, "points": BOX[:count]}, "file", least=3)


def moved(by: float) -> np.ndarray:
    """BOX, to the right; at 56 its right side is on the border of SIZE."""
    return np.array(BOX, dtype=float) + [by, 0]


@pytest.mark.parametrize(("by", "inside"), [(0, 1), (57.5, 1), (70, 1), (76, 0), (90, 0), (-45, 0)])
def test_a_polygon_is_refused_where_most_of_it_is_outside(by, inside):
    polygon, shape = moved(by).ravel().tolist(), {"label": "target", "points": moved(by).tolist()}
    for draw in (
        lambda: annotation_mask([polygon], SIZE, "file", "field"),
        lambda: draw_shape(shape, SIZE, "file"),
    ):
        if inside:
            assert draw().any()
        else:
            with pytest.raises(DataError, match=r"^file.*outside its image of 64×96"):
                draw()


def test_a_circle_may_lie_in_a_corner_but_not_outside():
    corner = {"label": "x", "shape_type": "circle", "points": [[0, 0], [0, 20]]}
    assert draw_shape(corner, SIZE, "file").sum() > 250  # a quarter of it
    with pytest.raises(DataError, match="lies outside"):
        draw_shape(corner | {"points": [[200, 0], [200, 20]]}, SIZE, "file")


def test_numbers_between_0_and_1_are_no_pixels():
    with pytest.raises(DataError, match="between 0 and 1, as YOLO"):
        annotation_mask([[0, 0, 1, 0, 1, 1, 0, 1]], SIZE, "file", "field")
    refuse_misplaced(np.array([[0, 0], [1, 0], [1, 1]]), 1, (1, 1), "an image of one pixel")


def test_slivers_and_clicks_in_the_first_corner_are_pixels():
    body, sliver = [2, 2, 6, 2, 6, 5, 2, 5], [0, 0, 0.9, 0.0, 0.5, 0.8]
    whole = annotation_mask([body], SIZE, "file", "field")
    more = annotation_mask([body, sliver], SIZE, "file", "field") & ~whole
    assert more.sum() <= 1, "it is drawn as what it is"
    click = {"label": "target", "shape_type": "polygon", "points": [[0.5, 0.5]]}
    assert draw_shape(click, SIZE, "file").sum() == 1


def test_run_lengths_keep_their_size():
    assert rle_of({"size": ["64", 96.0], "counts": "1"}, "f", "rle")["size"] == [64, 96]
    for size in (["64", 96.5], [64], [0, 96], [True, 96], ["x", 96], None):
        with pytest.raises(DataError, match='"rle" must be'):
            rle_of({"size": size, "counts": "1"}, "f", "rle")


def test_lists_in_lists_without_end_are_no_polygon():
    deep: list = [1.0]
    for _ in range(5000):
        deep = [deep]
    for read in (
        lambda: polygons_of(deep, "file", "polygons"),
        lambda: annotation_mask(deep, SIZE, "file", "field"),
        lambda: draw_shape({"label": "x", "points": deep}, SIZE, "file"),
    ):
        with pytest.raises(DataError, match="^file"):
            read()

"""Masks from files: run lengths and polygons, for any content, against rules that share no code
with them."""

import cv2
import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle_codec

from cores.dataset.annotations.masks import annotation_mask, paint_shapes
from cores.dataset.files.errors import DataError
from cores.dataset.files.rle import decode_rle

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


def random_mask(size: tuple[int, int], seed: int, density: float) -> np.ndarray:
    return np.random.default_rng(seed).random(size) < density


def runs(mask: np.ndarray) -> list[int]:
    """Lengths of equal pixels column by column, beginning with background."""
    flat = np.concatenate([[False], mask.T.ravel()])
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()


@given(size=SIZES, seed=st.integers(0, 2**32 - 1), density=st.sampled_from([0, 0.02, 0.5, 0.98, 1]))
@settings(deadline=None)
def test_run_lengths_round_trip(size, seed, density):
    mask = random_mask(size, seed, density)
    packed = rle_codec.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
    for counts in (packed, runs(mask)):
        record = {"size": list(size), "counts": counts}
        for found in (decode_rle(record, size, "f", "m"), annotation_mask(record, size, "f", "m")):
            assert found.dtype == bool and np.array_equal(found, mask)


@st.composite
def stars(draw, inside: bool) -> tuple[tuple[int, int], np.ndarray]:
    """((H, W), points float (n, 2) as (x, y)): a polygon around a centre, so that it never crosses
    itself.

    ``inside``: all of it is in the picture.
    """
    size = draw(st.tuples(st.integers(8, 60), st.integers(8, 60)))
    count = draw(st.integers(3, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    angles = 2 * np.pi * (np.arange(count) + rng.uniform(0.1, 0.9, count)) / count
    radius = rng.uniform(2, min(size) / 2 - 1 if inside else 0.7 * max(size), count)
    centre = np.array(size[::-1]) * (0.5 if inside else rng.uniform(0, 1, 2))
    return size, centre + np.stack([radius * np.cos(angles), radius * np.sin(angles)], 1)


def winding(points: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether (x, y) lies inside: the angles under which it sees the edges add up to a full
    turn."""
    there = points[:, None, None] - np.stack([x, y], -1)
    seen = np.arctan2(there[..., 1], there[..., 0])
    turns = np.diff(np.concatenate([seen, seen[:1]]), axis=0)
    return np.abs(((turns + np.pi) % (2 * np.pi) - np.pi).sum(0)) > np.pi


def distance(points: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of (x, y) from the nearest edge, in pixels."""
    place = np.stack([x, y], -1)
    nearest = np.full(x.shape, np.inf)
    for a, b in zip(points, np.roll(points, -1, 0), strict=True):
        along = np.clip(((place - a) @ (b - a)) / max(1e-9, (b - a) @ (b - a)), 0, 1)
        nearest = np.minimum(
            nearest, np.linalg.norm(place - a - along[..., None] * (b - a), axis=-1)
        )
    return nearest


@given(star=stars(inside=False))
@settings(max_examples=60, deadline=None)
def test_polygons_of_coco(star):
    """A pixel more than one pixel from every edge is in the mask exactly if its centre is
    inside."""
    size, points = star
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    clear = distance(points, x, y) > 1
    try:
        found = annotation_mask([points.ravel().tolist()], size, "f", "m")
    except DataError:  # mostly outside
        assert winding(points, x, y).sum() < cv2.contourArea(points.astype(np.float32))
        return
    assert np.array_equal(found[clear], winding(points, x, y)[clear])


@given(star=stars(inside=True))
@settings(max_examples=60, deadline=None)
def test_polygons_of_reason_seg(star):
    """Here coordinates are cut to whole pixels, a pixel is the point of its indices, and the
    outline belongs to the mask.

    Of a polygon that leaves the picture OpenCV draws the outline from where it cuts the border,
    rounded; that is not tested.
    """
    size, points = star
    points = points.astype(np.int32)
    # what is cut may cross itself, and then inside is a matter of definition
    assume(cv2.contourArea(points) > 4 and is_star(points))
    y, x = np.mgrid[: size[0], : size[1]].astype(float)
    away = distance(points.astype(float), x, y)
    target, ignore = paint_shapes([{"label": "target", "points": points.tolist()}], size)
    assert np.array_equal(target[away > 1], winding(points.astype(float), x, y)[away > 1])
    assert target[away == 0].all() and not ignore.any()


def is_star(points: np.ndarray) -> bool:
    """Whether the points still go once around their mean in one direction."""
    angle = np.unwrap(np.arctan2(*(points - points.mean(0)).T[::-1]))
    steps = np.diff(angle)
    return bool((steps > 0).all() and angle[-1] - angle[0] < 2 * np.pi)


@given(size=SIZES, seeds=st.lists(st.integers(0, 999), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_parts_of_a_coco_polygon_are_united(size, seeds):
    parts = [
        (np.random.default_rng(seed).random((4, 2)) * size[::-1]).ravel().tolist() for seed in seeds
    ]
    alone = [annotation_mask([part], size, "f", "m") for part in parts]
    assert np.array_equal(annotation_mask(parts, size, "f", "m"), np.any(alone, axis=0))

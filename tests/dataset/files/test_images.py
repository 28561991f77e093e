"""Pictures are decoded by what they hold, turned by what their annotations say, or refused in one
line."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cores.dataset.files.errors import DataError
from cores.dataset.files.images import (
    claimed_size,
    probe_images,
    read_image,
    read_label,
    rgb_array,
    whole_number,
)

STORED = np.kron(
    np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8),
    np.ones((8, 8, 1), np.uint8),
)
FORMATS = {
    "JPEG": {},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {"compression": "tiff_lzw"},
    "AVIF": {"quality": 100},
    "MPO": {"save_all": True, "append_images": [Image.fromarray(STORED[::-1])]},
}


class Bytes:
    """A picture that is no file."""

    def __init__(self, content: bytes):
        self.content = content

    def __str__(self) -> str:
        return "x.jpg"

    def open(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self.content)


def encoded(name: str, orientation: int = 1, **options) -> bytes:
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(STORED).save(stream, name, exif=exif, **options)
    return stream.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", FORMATS)
def test_a_picture_is_turned_unless_its_annotations_say_otherwise(name, orientation):
    content = encoded(name, orientation, **FORMATS[name])
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    assert np.array_equal(read_image(Bytes(content)), upright)
    assert np.array_equal(rgb_array(Image.open(io.BytesIO(content))), upright)
    lying = read_image(Bytes(content), [STORED.shape[:2], None])
    if orientation < 5:  # Both have the same size.
        assert np.array_equal(lying, upright)
    else:
        assert lying.shape == STORED.shape and np.abs(lying.astype(int) - STORED).mean() < 30
    both = [STORED.shape[:2], STORED.shape[1::-1], (1, 1)]
    assert orientation < 5 or np.array_equal(read_image(Bytes(content), both), upright)


@given(
    name=st.sampled_from(["JPEG", "PNG", "TIFF", "WEBP", "AVIF", "GIF", "BMP", "DDS", "ICO"]),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1),
    end=st.floats(0.02, 1),
)
@settings(max_examples=150, deadline=None)
def test_a_damaged_picture_is_one_kind_of_error(name, places, end):
    content = bytearray(encoded(name) if name not in ("GIF", "BMP", "DDS", "ICO") else plain(name))
    for place, value in places:
        content[int(place**3 * len(content))] = value  # rather in the head
    damaged = Bytes(bytes(content[: max(1, int(end * len(content)))]))
    for read in (read_image, read_label, lambda picture: probe_images([picture])):
        said = "x.jpg: "
        try:
            read(damaged)
        except DataError as error:
            said = str(error)
        assert said.startswith("x.jpg: ") and "\n" not in said


def plain(name: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(STORED).save(stream, name)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("value", "whole"),
    [
        (7, 7),
        (7.0, 7),
        ("7", 7),
        (" 7.0 ", 7),
        (10**400, 10**400),
        (7.5, None),
        ("7px", None),
        (True, None),
    ]
    + [(value, None) for value in (None, [7], "nan", float("inf"), "")],
)
def test_whole_numbers_as_tools_write_them(value, whole):
    assert whole_number(value) == whole


def test_a_size_is_whole_or_left_out():
    assert claimed_size({"height": "4", "width": 5.0}, "f") == (4, 5)
    assert claimed_size({"height": None}, "f") is None
    for bad in ({"height": 4}, {"height": 0, "width": 5}, {"height": 4, "width": "x"}):
        with pytest.raises(DataError, match='f: "height" and "width" must be whole numbers'):
            claimed_size(bad, "f")

"""Images and label maps. Every error is one line that names the file.

H and W are the height and width of an image in the *original* frame, which is the image as a viewer
shows it: the orientation that EXIF stores is already applied."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose

from cores.dataset.files.errors import DataError, MissingDataError, reason_of
from cores.dataset.files.paths import refuse_endless

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif")
# Pillow knows 40 more, among them PostScript, which it gives to another program to run.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
# EXIF orientation -> what makes a stored picture upright, and what undoes it.
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_STORED = _UPRIGHT | {6: Transpose.ROTATE_90, 8: Transpose.ROTATE_270}
DEEP_BLACK = 16  # of 255: what 12 bits in a file of 16 bits never reach


class EmbeddedImage(Protocol):
    """An image that is no file of its own but a part of one; ``str`` gives its name in messages."""

    def open(self, mode: str) -> BinaryIO:
        """The bytes of the image's file. ``mode``: "rb"."""


def _as_file(path: str | Path | EmbeddedImage) -> Path | EmbeddedImage:
    # A table's image is a str with a method ``open`` (dataset/readers/own/arrow.py).
    return Path(path) if isinstance(path, str) and not hasattr(path, "open") else path


def _open(path: Path | EmbeddedImage) -> Image.Image:
    """The file, not yet decoded. One that claims more pixels than Pillow's limit (89 million) is
    refused with that limit, and so is any format but FORMATS, whatever the file is called."""
    if isinstance(path, Path):
        refuse_endless(path)
    file = path if isinstance(path, Path) else path.open("rb")
    try:
        with warnings.catch_warnings():  # Up to twice its limit, Pillow only warns.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file, formats=FORMATS)
    except FileNotFoundError:
        raise MissingDataError(
            f"{path}: image does not exist; restore it or remove its entry from the data set"
        ) from None
    # A decoder of a damaged file may raise anything: KeyError, struct.error, RuntimeError …
    except Exception as error:
        unknown = f"unknown format, none of {', '.join(FORMATS)}"
        reason = unknown if isinstance(error, UnidentifiedImageError) else reason_of(error)
        raise DataError(
            f"{path}: not a readable image ({reason}); replace or remove the file"
        ) from None


def _load(picture: Image.Image, path: Path | EmbeddedImage) -> None:
    try:
        picture.load()
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise DataError(
            f"{path}: broken image ({reason_of(error)}); replace or remove the file"
        ) from None


def rgb_array(picture: Image.Image) -> np.ndarray:
    """A picture as uint8 (H, W, 3) RGB, turned as its EXIF orientation says, transparent parts on
    white.

    Raises ValueError for one that is broken, for a mode without an RGB equivalent, and where the
    range of the values is not known.
    """

    def load() -> None:
        try:
            picture.load()
        except MemoryError:
            raise
        except Exception as error:  # as in _open
            raise ValueError(reason_of(error)) from None

    return np.array(_upright(picture, load)[0])


def _upright(
    picture: Image.Image, load: Callable[[], None]
) -> tuple[Image.Image, Transpose | None]:
    """(the picture in RGB as a viewer shows it, what turns this back to how it is stored).
    ``load`` decodes it, after which Pillow has forgotten how it was stored."""
    layouts = [tile[3] for tile in getattr(picture, "tile", ())]
    names = [str(args[0] if isinstance(args, tuple) and args else args) for args in layouts]
    is_deep = any(";16" in name for name in (picture.mode, *names))
    # Pillow turns a TIFF itself, while it decodes it; a PNG may have its orientation at the end.
    is_tiff = picture.format == "TIFF"
    orientation = _orientation(picture) if is_tiff else 1
    load()
    orientation = orientation if is_tiff else _orientation(picture)
    rgb = _to_rgb(picture)
    if is_deep and 0 < max(np.ravel(rgb.getextrema())) < DEEP_BLACK:
        raise ValueError(
            "its 16-bit pixels end below 4096, as those of a 12-bit camera do, and would be black;"
            " scale them to the full range"
        )
    if orientation not in _UPRIGHT:
        return rgb, None
    return rgb if is_tiff else rgb.transpose(_UPRIGHT[orientation]), _STORED[orientation]


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # The pixels are sound even where the EXIF data beside them are broken.
        return 1


def _to_rgb(picture: Image.Image) -> Image.Image:
    # Pillow would show 32-bit values between 0 and 1, or between 0 and 255, as black.
    if picture.mode in ("F", "I"):
        kind = "floating-point" if picture.mode == "F" else "32-bit"
        raise ValueError(f"{kind} pixels have no known range; save it with 8 or 16 bits")
    # Pillow's own conversion of 16-bit grey would clip at 255 instead of scaling.
    if picture.mode.startswith("I;16"):
        grey = (np.asarray(picture, dtype=np.float32) / 257).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if picture.format == "TIFF" and picture.mode == "RGBA" and not _is_alpha(picture):
        raise ValueError(
            "its fourth band is no alpha, perhaps infrared; save red, green and blue alone"
        )
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        # Transparent pixels hold arbitrary colours; a viewer shows white there.
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(paper, picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _is_alpha(picture: Image.Image) -> bool:
    """Whether the fourth band of a TIFF, which may call any band so, can be its transparency: it
    has few values, or is wholly transparent or opaque somewhere."""
    counts = picture.getchannel("A").histogram()
    return sum(count > 0 for count in counts) <= 16 or counts[0] + counts[255] >= 0.01 * sum(counts)


def read_image(
    path: str | Path | EmbeddedImage, sizes: Iterable[tuple[int, int] | None] = ()
) -> np.ndarray:
    """The image as uint8 (H, W, 3) RGB. Grey, palette, CMYK, 16-bit and transparent files are
    converted; of several pictures in a file it is the first one.

    ``sizes``: the (H, W) of its annotations, as far as they say; asked for only where it matters.
    An image that has one of these only without its EXIF orientation is not turned, because its
    annotators saw it unturned.

    Raises MissingDataError if the file is not there and DataError if it cannot be decoded
    completely.
    """
    path = _as_file(path)
    with _open(path) as picture:
        try:
            upright, back = _upright(picture, partial(_load, picture, path))
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: cannot be converted to RGB ({reason_of(error)})") from None
        if back is not None and upright.width != upright.height:
            size, claimed = (upright.height, upright.width), set(sizes)
            if size[::-1] in claimed and size not in claimed:
                upright = upright.transpose(back)
        return np.array(upright)


def image_size(path: str | Path | EmbeddedImage) -> tuple[int, int]:
    """The (H, W) in the head of an image file, before it is turned. Raises DataError."""
    with _open(_as_file(path)) as picture:
        return picture.height, picture.width


def read_label(path: str | Path | EmbeddedImage, colours: bool = False) -> np.ndarray:
    """A label map (grey or palette PNG, 8 or 16 bit; also one whose channels are all equal, opaque)
    as int32 (H, W).

    ``colours``: of an image in colour, every colour is a label, and black is 0; of one with a
    single colour, its transparency is the label. Raises DataError for any other image.
    """
    path = _as_file(path)
    with _open(path) as picture:
        _load(picture, path)
        if picture.mode in ("L", "P", "1", "I", "I;16", "I;16B"):
            return np.array(picture).astype(np.int32)
        if picture.mode in ("RGB", "RGBA", "LA"):
            bands = [np.array(band).astype(np.int32) for band in picture.split()]
            alpha = bands.pop() if picture.mode in ("RGBA", "LA") else np.zeros(())
            red, green, blue = bands if len(bands) == 3 else 3 * bands
            is_grey = np.array_equal(red, green) and np.array_equal(red, blue)
            label = red if is_grey else red << 16 | green << 8 | blue
            # What is transparent may be the background, and then colours need not tell it.
            says_alpha = colours and bool(np.ptp(alpha)) and not np.ptp(label)
            if np.ptp(alpha) and not says_alpha and not np.array_equal(label != 0, alpha != 0):
                raise DataError(
                    f"{path}: has a transparency, and may mean it or its colours; save it with one"
                    " channel"
                )
            if is_grey or colours:
                return alpha if says_alpha else label
        raise DataError(
            f"{path}: a label map must have one channel, this image has mode {picture.mode}"
        )


def probe_images(paths: Iterable[Path | EmbeddedImage]) -> None:
    """Raises DataError for the first file that is missing, no image or cut off. It reads only the
    two ends of each sound file, so that many can be checked before any long work."""
    for path in paths:
        with _open(path) as picture:
            if picture.format in ("JPEG", "MPO") and not _ends_like_jpeg(path):
                # Decoding tells a file that is cut off from one with other data behind the image.
                _load(picture, path)


def _ends_like_jpeg(path: Path | EmbeddedImage) -> bool:
    with path.open("rb") as stream:
        stream.seek(0, 2)
        stream.seek(max(0, stream.tell() - 64))
        return b"\xff\xd9" in stream.read()


def check_size(found: tuple[int, ...], image: tuple[int, ...], path: str | Path, what: str) -> None:
    """Refuses a mask, label map or entry whose (H, W) differs from its image's."""
    if tuple(found[:2]) != tuple(image[:2]):
        found_size, image_size = (f"{size[0]}×{size[1]}" for size in (found, image))
        raise DataError(
            f"{path}: {what} is {found_size} (height × width) but its image is {image_size}; was"
            " the photo resized, cropped or turned (EXIF orientation) after it was annotated?"
        )


def whole_number(value: Any) -> int | None:
    """A whole number, also as tools write it: 640.0 and "640"; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value == int(value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def claimed_size(
    entry: dict, where: object, height: str = "height", width: str = "width"
) -> tuple[int, int] | None:
    """The (H, W) of the fields named ``height`` and ``width``, or None where both are missing.
    Raises DataError."""
    if entry.get(height) is None and entry.get(width) is None:
        return None
    h, w = whole_number(entry.get(height)), whole_number(entry.get(width))
    if h is None or w is None or min(h, w) < 1:
        raise DataError(f'{where}: "{height}" and "{width}" must be whole numbers of pixels')
    return h, w


def read_claimed(
    path: str | Path | EmbeddedImage, size: tuple[int, int] | None, source: object
) -> np.ndarray:
    """``read_image`` for annotations in ``source`` whose image has that ``size`` (H, W). Raises
    DataError unless it has."""
    image = read_image(path, [size])
    check_claim(size, image.shape, path, source)
    return image


def check_claim(
    size: tuple[int, int] | None, image: tuple[int, ...], path: object, source: object
) -> None:
    """Refuses an image of another (H, W) than ``source`` says its annotations were made for."""
    if size is not None:
        check_size(size, image, str(path), f"the size in {source}")

"""Images and label maps. Every error is one line that names the file.

H and W are the height and width of an image in the *original* frame, which is the image as a viewer
shows it: the orientation that EXIF stores is already applied."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dataset.files.errors import DataError, MissingDataError, reason_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif")


class EmbeddedImage(Protocol):
    """An image that is no file of its own but a part of one; ``str`` gives its name in messages."""

    def open(self, mode: str) -> BinaryIO:
        """The bytes of the image's file. ``mode``: "rb"."""


def _as_file(path: str | Path | EmbeddedImage) -> Path | EmbeddedImage:
    # A table's image is a str with a method ``open`` (dataset/readers/own/arrow.py).
    return Path(path) if isinstance(path, str) and not hasattr(path, "open") else path


def _open(path: Path | EmbeddedImage) -> Image.Image:
    """The file, not yet decoded. One that claims more pixels than Pillow's limit (89 million) is
    refused with that limit."""
    file = path if isinstance(path, Path) else path.open("rb")
    try:
        with warnings.catch_warnings():  # Up to twice its limit, Pillow only warns.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file)
    except FileNotFoundError:
        raise MissingDataError(
            f"{path}: image does not exist; restore it or remove its entry from the data set"
        ) from None
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombWarning,
        Image.DecompressionBombError,
    ) as error:
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else reason_of(error)
        raise DataError(
            f"{path}: not a readable image ({reason}); replace or remove the file"
        ) from None


def _load(picture: Image.Image, path: Path | EmbeddedImage) -> None:
    try:
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: broken image ({reason_of(error)}); replace or remove the file"
        ) from None


def rgb_array(picture: Image.Image) -> np.ndarray:
    """A decoded picture as uint8 (H, W, 3) RGB, turned as its EXIF orientation says, transparent
    parts on white.

    Raises ValueError for a mode without an RGB equivalent.
    """
    if picture.mode == "F":  # Pillow would show all values between 0 and 1 as black.
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    return np.array(_to_rgb(_turned(picture)))


def _turned(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except (OSError, ValueError, SyntaxError, struct.error, TypeError, ZeroDivisionError):
        return picture  # The pixels are sound even where the EXIF data beside them are broken.


def _to_rgb(picture: Image.Image) -> Image.Image:
    # Pillow's own conversion of 16-bit grey would clip at 255 instead of scaling.
    if picture.mode in ("I", "I;16", "I;16B", "I;16L"):
        grey = (np.asarray(picture, dtype=np.float32) / 257).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        # Transparent pixels hold arbitrary colours; a viewer shows white there.
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(paper, picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def read_image(path: str | Path | EmbeddedImage, size: tuple[int, int] | None = None) -> np.ndarray:
    """The image as uint8 (H, W, 3) RGB. Grey, palette, CMYK, 16-bit and transparent files are
    converted.

    ``size``: the (H, W) of its annotations. An image that has this size only without its EXIF
    orientation is not turned, because its annotators saw it unturned.

    Raises MissingDataError if the file is not there and DataError if it cannot be decoded
    completely.
    """
    path = _as_file(path)
    with _open(path) as picture:
        _load(picture, path)
        try:
            pixels = rgb_array(picture)
        except ValueError as error:
            raise DataError(f"{path}: cannot be converted to RGB ({reason_of(error)})") from None
        if size is not None and pixels.shape[:2] != tuple(size) == (picture.height, picture.width):
            return np.array(_to_rgb(picture))
        return pixels


def read_label(path: str | Path | EmbeddedImage) -> np.ndarray:
    """A label map (grey or palette PNG, 8 or 16 bit) as int32 (H, W). Raises DataError for colour
    images."""
    path = _as_file(path)
    with _open(path) as picture:
        _load(picture, path)
        if picture.mode not in ("L", "P", "1", "I", "I;16", "I;16B"):
            raise DataError(
                f"{path}: a label map must have one channel, this image has mode {picture.mode}"
            )
        return np.array(picture).astype(np.int32)


def probe_images(paths: Iterable[Path | EmbeddedImage]) -> None:
    """Raises DataError for the first file that is missing, no image or cut off. It reads only the
    two ends of each sound file, so that many can be checked before any long work."""
    for path in paths:
        with _open(path) as picture:
            if picture.format == "JPEG" and not _ends_like_jpeg(path):
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
            f"{path}: {what} is {found_size} (height × width) but its image is {image_size}"
        )


def read_claimed(path: str | Path, entry: dict, source: object) -> np.ndarray:
    """``read_image`` for an entry of ``source``. Raises DataError unless the image has the entry's
    height and width."""
    size = entry["height"], entry["width"]
    image = read_image(path, size)
    check_size(size, image.shape, path, f"the size in {source}")
    return image

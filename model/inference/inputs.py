"""What may be asked: pictures of every kind and questions, checked and cleaned before a model sees
them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cores.dataset.files.errors import DataError
from cores.dataset.files.images import read_image, rgb_array

ImageLike = str | Path | Image.Image | np.ndarray
# CLIP's transform enlarges the shorter side, which would make gigabytes of a line of pixels.
MAX_ASPECT = 100


def load_image(image: ImageLike, argument: str = "image") -> tuple[np.ndarray, str]:
    """(uint8 (H, W, 3) RGB, name) of a path, a PIL image or an array uint8 (H, W, 3) RGB.

    ``argument``: what messages call one that has no path. Raises DataError for a file that is no
    image or too large, ValueError for another array, anything else or an extreme shape.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"{argument}: an array must be uint8 (H, W, 3) RGB, got {image.dtype}"
                f" {image.shape}; PIL.Image.fromarray(array) takes grey and RGBA, floats from 0 to"
                " 1 become (255 * array).astype('uint8')"
            )
        pixels, name = image, ""
    elif isinstance(image, Image.Image):
        pixels, name = _pixels_of(image, argument), getattr(image, "filename", "")
    elif isinstance(image, (str, Path)):
        if re.match(r"\w{2,}:/{1,2}\w", str(image)) and not Path(image).exists():
            raise ValueError(
                f"{argument} {image}: is an address, and nothing is fetched; download the picture"
                " and give its path"
            )
        pixels, name = read_image(image), str(image)
    else:
        raise ValueError(
            f"{argument}: give a path, a PIL image or an array uint8 (H, W, 3), got"
            f" {type(image).__name__}"
        )
    height, width = pixels.shape[:2]
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        where = name or argument
        raise ValueError(
            f"{where}: {width}×{height} pixels; one side may be at most {MAX_ASPECT} times the"
            " other, crop the picture"
        )
    return pixels, str(name or "image")


def _pixels_of(image: Image.Image, argument: str) -> np.ndarray:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise DataError(
            f"{argument}: {image.width}×{image.height} pixels, more than the limit of {limit}"
            " pixels; make it smaller"
        )
    try:
        return rgb_array(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{argument}: cannot be decoded ({' '.join(str(error).split())})") from None


def clean_question(text: str) -> str:
    """One line without control characters or broken Unicode. Raises ValueError for one that says
    nothing."""
    if not isinstance(text, str):
        raise ValueError(f"a question must be a text, got {type(text).__name__} {text!r:.40}")
    whole = re.sub("[\ud800-\udfff]", "\ufffd", text)  # Halves of a character cannot be encoded.
    control = ("Cc", "Zl", "Zp")
    printable = (" " if unicodedata.category(c) in control else c for c in whole)
    question = " ".join("".join(printable).split())
    if not question:
        raise ValueError("the question is empty")
    return question


def clean_questions(query: Any, argument: str = "query") -> list[str]:
    """The questions about one picture, as they will be asked. Raises ValueError naming
    ``argument``."""
    if isinstance(query, (bytes, Mapping)) or not isinstance(query, Iterable):
        raise ValueError(f"{argument}: give a text or a list of texts, got {type(query).__name__}")
    try:
        return [clean_question(text) for text in ([query] if isinstance(query, str) else query)]
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None

"""Masks as run lengths, in COCO's compressed and uncompressed form.

H and W are the height and width of an image in the *original* frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle_codec

from cores.dataset.files.errors import DataError, reason_of
from cores.dataset.files.images import check_size, whole_number


def run_lengths(text: str) -> np.ndarray:
    """The runs of a compressed mask, int64, of background and target in turns. Raises ValueError
    for any other text.

    pycocotools checks nothing: of runs that do not add up to the picture it decodes memory that it
    never wrote, or compares them for ever.

    A number is written in groups of five bits, lowest first, each as one character from "0" on with
    the sixth bit set if another group follows; from the fourth number on it is the difference to
    the number two places before it.
    """
    codes = np.frombuffer(text.encode("latin-1", "replace"), dtype=np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("not compressed run lengths")
    starts = np.flatnonzero(np.concatenate([[True], (codes[:-1] & 32) == 0]))
    sizes = np.diff([*starts, len(codes)])
    if sizes.max() > 7:
        raise ValueError("a run is too long")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, sizes))
    numbers = np.add.reduceat((codes & 31) << shifts, starts)
    # The highest bit of the last group is the sign, in two's complement.
    numbers -= np.where(codes[starts + sizes - 1] & 16, np.int64(1) << (5 * sizes), 0)
    for parity in (1, 2):
        numbers[parity::2] = np.cumsum(numbers[parity::2])
    if (numbers < 0).any():
        raise ValueError("a run is negative")
    return numbers


def _plain(counts: Any) -> Any:
    """Of str(bytes), as programs write pycocotools' bytes by mistake, the text that is meant. No
    other run lengths hold a quotation mark."""
    if not isinstance(counts, str) or counts[:2] not in ("b'", 'b"') or counts[-1] != counts[1]:
        return counts
    return counts[2:-1].replace("\\\\", "\\")


def rle_size(rle: Any) -> tuple[int, int] | None:
    """The (H, W) that run lengths give, or None if they give none."""
    size = rle.get("size") if isinstance(rle, dict) else None
    if not isinstance(size, list) or len(size) != 2:
        return None
    height, width = map(whole_number, size)
    return None if height is None or width is None else (height, width)


def decode_rle(rle: Any, size: tuple[int, int], path: str | Path, field: str) -> np.ndarray:
    """A COCO run-length mask ({"size": [H, W], "counts": text or list}) as bool (H, W).

    ``size``: the (H, W) that the mask must have. Raises DataError naming ``path`` and ``field`` for
    anything malformed.
    """
    counts: Any = _plain(rle.get("counts")) if isinstance(rle, dict) else None
    claimed = rle_size(rle) if isinstance(counts, (str, list)) else None
    if claimed is None:
        raise DataError(f'{path}: "{field}" must be {{"size": [height, width], "counts": …}}')
    check_size(claimed, size, path, f'"{field}"')
    height, width = size
    try:
        if isinstance(counts, list):
            sound = all(isinstance(run, int) and run >= 0 for run in counts)
            if not sound or sum(counts) != height * width:
                raise ValueError(f"the runs do not add up to {height * width} pixels")
            runs = {"size": [height, width], "counts": counts}
            counts = rle_codec.frPyObjects(runs, height, width)["counts"]
        elif (total := int(run_lengths(counts).sum())) != height * width:
            raise ValueError(f"the runs add up to {total} pixels, the image has {height * width}")
        return rle_codec.decode({"size": [height, width], "counts": counts}).astype(bool)
    except (ValueError, TypeError) as error:
        raise DataError(
            f'{path}: "{field}" is not a valid run-length mask ({reason_of(error)})'
        ) from None


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """A mask bool (H, W) as COCO's compressed run lengths, ready for JSON: {"size": [H, W],
    "counts": text}."""
    rle = rle_codec.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}

"""What is wrong with a file of a data set, said in one line that names it."""

from __future__ import annotations

BOXES_ONLY = (
    "has no mask, as in files that hold boxes or keypoints only; python -m utils.boxes_to_masks"
    " makes masks of boxes"
)


class DataError(ValueError):
    """A file of a data set is missing, broken or contradicts another one. The message names the
    file and what to do.

    ``item``: the file, or the place in one, that is to blame, where it is not the whole sample (see
    dataset/files/faults.py).
    """

    item: str | None = None
    others: tuple[DataError, ...] = ()
    """What is wrong with further items of the same sample."""


class MissingDataError(DataError, FileNotFoundError):
    """A file or folder that a data set needs is not there."""


class NothingToAsk(DataError):
    """The image is sound, but nothing in it may be asked for (for example: all pixels are void).
    Training takes another image."""


class DamagedRecords(Exception):
    """The checksum of a record differs from the one that was written beside it."""


def reason_of(error: Exception) -> str:
    """The reason in one line, without the path, which the caller's message names already."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__

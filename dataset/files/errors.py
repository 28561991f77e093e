"""What is wrong with a file of a data set, said in one line that names it."""

from __future__ import annotations


class DataError(ValueError):
    """A file of a data set is missing, broken or contradicts another one. The message names the
    file and what to do.

    ``item``: the file, or the place in one, that is to blame, where it is not the whole sample (see
    dataset/files/faults.py).
    """

    item: str | None = None


class MissingDataError(DataError, FileNotFoundError):
    """A file or folder that a data set needs is not there."""


class NothingToAsk(DataError):
    """A sound image in which nothing may be asked for, such as one of void classes only. Training
    takes another one."""


class DamagedRecords(Exception):
    """A record is not what was written."""

"""Records packed end to end, as the tables of an index hold them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from cores.dataset.files.errors import DamagedRecords


class PackedRecords:
    """A read-only list of JSON-like records in one flat buffer.

    A forked worker copies every Python object whose reference count it changes, so a list of a
    million records would soon exist once per worker. One buffer stays shared between workers, and
    between all processes where it is a mapped file (dataset/files/store.py).
    """

    def __init__(self, records: Iterable[Any]):
        blobs = [json.dumps(record, separators=(",", ":")).encode() for record in records]
        self._ends = np.cumsum([0] + [len(blob) for blob in blobs])
        self._buffer = np.frombuffer(b"".join(blobs), dtype=np.uint8)
        self._sums: np.ndarray | None = None

    @classmethod
    def over(cls, buffer: np.ndarray, ends: np.ndarray, sums: np.ndarray) -> PackedRecords:
        """Records that were written before: record i is JSON in ``buffer[ends[i] : ends[i + 1]]``
        (uint8), and ``sums[i]`` (uint32) is its CRC-32."""
        packed = cls.__new__(cls)
        packed._buffer, packed._ends, packed._sums = buffer, ends, sums
        return packed

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Any:
        """Record ``index``. Raises IndexError, or DamagedRecords if its checksum is wrong."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        blob = self._buffer[self._ends[index] : self._ends[index + 1]].tobytes()
        if self._sums is not None and zlib.crc32(blob) != self._sums[index]:
            raise DamagedRecords(index)
        return json.loads(blob)

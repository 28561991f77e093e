"""Records that carry their own checksum: the files and lines that this program writes for itself to
read again."""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

from dataset.files.errors import DamagedRecords

CHECKSUM = "crc32"
_SEALED = re.compile(rb'(.*), "crc32": "([0-9a-f]{8})"\}', re.DOTALL)


def seal(record: dict[str, Any]) -> bytes:
    """A JSON object in one line whose last entry is the CRC-32 of the text before it."""
    text = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")[:-1]
    return text + f', "{CHECKSUM}": "{zlib.crc32(text):08x}"}}'.encode()


def unseal(line: bytes) -> dict[str, Any]:
    """The record of what ``seal`` wrote. One without a checksum, from before there were any, is
    taken as it is; so its fields have to be checked by whoever knows them.

    Raises DamagedRecords for a wrong checksum and for what is no JSON object.
    """
    found = _SEALED.fullmatch(line.strip())
    if found and zlib.crc32(found[1]) != int(found[2], 16):
        raise DamagedRecords("its checksum is wrong")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise DamagedRecords("it is no JSON") from None
    # A checksum in another place or form is one that was damaged itself.
    if not isinstance(record, dict) or (not found and CHECKSUM in record):
        raise DamagedRecords("it is not what was written")
    record.pop(CHECKSUM, None)
    return record

"""Records that carry their own checksum: the files and lines that this program writes for itself to
read again."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

from cores.dataset.files.errors import DamagedRecords
from cores.dataset.files.write import write_text

CHECKSUM = "crc32"
# The end of a record in one line, and of one with a line for each entry.
_SEALED = re.compile(rb'(.*)(?:, "crc32": "([0-9a-f]{8})"|,\n "crc32": "([0-9a-f]{8})"\n)\}', re.S)


def seal(record: dict[str, Any]) -> bytes:
    """A JSON object in one line whose last entry is the CRC-32 of the text before it."""
    text = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")[:-1]
    return text + f', "{CHECKSUM}": "{zlib.crc32(text):08x}"}}'.encode()


def unseal(text: bytes) -> dict[str, Any]:
    """The record of what ``seal`` or ``write_sealed`` wrote. One without a checksum, from before
    there were any, is taken as it is; so its fields have to be checked by whoever knows them.

    Raises DamagedRecords for a wrong checksum and for what is no JSON object.
    """
    found = _SEALED.fullmatch(text.strip())
    if found and zlib.crc32(found[1]) != int(found[2] or found[3], 16):
        raise DamagedRecords("its checksum is wrong")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise DamagedRecords("it is no JSON") from None
    # A checksum in another place or form is one that was damaged itself.
    if not isinstance(record, dict) or (not found and CHECKSUM in record):
        raise DamagedRecords("it is not what was written")
    record.pop(CHECKSUM, None)
    return record


def write_sealed(file: Path, record: dict[str, Any]) -> None:
    """Writes a record for people to read, too, a line for each entry; see ``write_text``."""
    text = json.dumps(record, indent=1).removesuffix("\n}")
    write_text(file, f'{text},\n "{CHECKSUM}": "{zlib.crc32(text.encode()):08x}"\n}}\n')


def read_sealed(file: Path) -> dict[str, Any]:
    """The record in ``file``. Raises FileNotFoundError, or ValueError, one line that names the
    file, where it is damaged."""
    try:
        return unseal(file.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    except DamagedRecords as error:
        raise ValueError(f"{file}: damaged ({error})") from None

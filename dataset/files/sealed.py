"""JSON objects of our own with a checksum inside, so that a reader notices what a disk or an editor
did to them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from dataset.files.write import write_text

CHECKSUM = "crc32"


def write_sealed(file: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object with its checksum; see ``write_text``."""
    text = json.dumps(content | {CHECKSUM: _checksum(content)}, indent=1)
    write_text(file, text + "\n")


def read_sealed(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``, without its checksum; one without a checksum is taken for what
    it says. Raises FileNotFoundError, or ValueError, one line that names the file, where it is
    damaged."""
    try:
        content = json.loads(file.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file}: damaged (not UTF-8)") from None
    except RecursionError:
        raise ValueError(f"{file}: damaged (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: damaged (not a JSON object)")
    checksum = content.pop(CHECKSUM, None)
    if checksum is not None and checksum != _checksum(content):
        raise ValueError(f"{file}: damaged (its checksum is that of another content)")
    return content


def _checksum(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"

"""Text and JSON files in whatever encoding they come."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from dataset.files.errors import DataError, MissingDataError, reason_of


def read_text(path: str | Path) -> str:
    """A text file in UTF-8 or, as some ReasonSeg files are, in Windows-1252. Raises DataError
    naming the file."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise MissingDataError(
            f"{path}: does not exist; check the path (of a data set: --dataset_dir and its name)"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({reason_of(error)}); a text file is expected"
        ) from None
    if not raw.strip(b"\0 \r\n\t"):
        raise DataError(f"{path}: the file is empty; restore or remove it")
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw[:4]:
        raise DataError(f"{path}: is written in UTF-16 or UTF-32; save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    try:
        return raw.decode("cp1252")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: neither UTF-8 nor Windows-1252 ({reason_of(error)}); save it as UTF-8"
        ) from None


def read_json(path: str | Path) -> Any:
    """The content of a JSON file, encoded as ``read_text`` says. Raises DataError naming the
    file."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not valid JSON ({reason_of(error)}); repair or remove the file"
        ) from None

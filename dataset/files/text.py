"""Text and JSON files in whatever encoding they come."""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

from cores.dataset.files.encodings import marked_encoding, plausible_encodings, proves_little
from cores.dataset.files.errors import DataError, MissingDataError, reason_of
from cores.dataset.files.paths import list_files, refuse_endless

logger = logging.getLogger(__name__)
FILES_TO_ASK = 500
_said: set[tuple[Path, str]] = set()


def text_encoding(path: Path, raw: bytes) -> str:
    """The encoding of the content of a text file: what its byte order mark says, UTF-8, or one that
    the text proves, which the log says once for a folder. Raises DataError naming the file."""
    if marked := marked_encoding(raw):
        return marked
    if b"\0" in raw[:4]:
        raise DataError(f"{path}: is written in UTF-32 or holds zeros; save it as UTF-8")
    try:
        is_weak = proves_little(raw.decode("utf-8"))
    except UnicodeDecodeError:
        found = plausible_encodings(raw)
    else:
        # A character or two of Chinese may happen to be UTF-8, but its neighbours are not.
        nearby = _plausible_in(path.parent, path.suffix) if is_weak else set()
        guesses = plausible_encodings(raw) if nearby else {}  # slow, and nearly all files are UTF-8
        found = {name: shown for name, shown in guesses.items() if name in nearby}
        if not found:
            return "utf-8"
    if len(found) > 1:
        agreed = found.keys() & _plausible_in(path.parent, path.suffix)
        found = {name: found[name] for name in agreed} if len(agreed) == 1 else found
    if len(found) != 1:
        reason = (
            f"may be {' or '.join(found.values())}" if found else "gives no usual words otherwise"
        )
        raise DataError(
            f"{path}: is not UTF-8, and {reason}; save it as UTF-8 (iconv -f ENCODING -t UTF-8)"
        )
    encoding, shown = next(iter(found.items()))
    if (path.parent, encoding) not in _said:
        _said.add((path.parent, encoding))
        logger.warning(
            "%s: is not UTF-8; it is read as %s, like others in this folder where they fit it",
            path,
            shown,
        )
    return encoding


@lru_cache(maxsize=8)
def _plausible_in(folder: Path, suffix: str) -> set[str]:
    """The encodings that are plausible for all files of a folder that are not UTF-8: labels are
    short, but tools write all files alike."""
    agreed: set[str] | None = None
    for path in list_files(folder, (suffix.lower(),), follow_links=True)[:FILES_TO_ASK]:
        try:
            raw = path.read_bytes()
            raw.decode("utf-8")
        except OSError:
            continue
        except UnicodeDecodeError:
            found = set(plausible_encodings(raw))
            if found:  # A damaged file says nothing.
                agreed = found if agreed is None else agreed & found
    return agreed or set()


def read_text(path: str | Path) -> str:
    """A text file in whatever encoding ``text_encoding`` proves. Raises DataError naming the
    file."""
    path = Path(path)
    refuse_endless(path)
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
    encoding = text_encoding(path, raw)
    try:
        return raw.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not the {encoding} that its start says ({reason_of(error)}); save it as"
            " UTF-8"
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

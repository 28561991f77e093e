"""Paths as people type them, paste them, or drop them on a terminal."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

ADDRESS = re.compile(r"(https?|ftp|s3|gs)://", re.IGNORECASE)
WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\\w")
PICTURE = re.compile(r"\.(jpe?g|jpe|jfif|png|webp|bmp|tiff?|gif|avif|heic)$", re.IGNORECASE)


def typed_path(text: str) -> Path:
    """The path that a text means: as it stands if there is such a file, else without the quotes and
    backslashes that terminals put around special characters, or out of a file:// address.
    """
    meant = [Path(os.path.expanduser(spelling)) for spelling in _spellings(text)]
    return next((path for path in meant if _exists(path)), meant[-1])


def names_a_path(text: str) -> bool:
    """Whether a line of a conversation is meant as a path, right or wrong, and not as a question:
    it is a file, or it begins as only a path does, or it is one word that ends as the name of a
    picture or lies in a folder that is there."""
    text = text.strip()
    if _exists(typed_path(text)):
        return True
    spelling = _spellings(text)[-1]
    first = spelling.split(maxsplit=1)[0] if spelling.split() else ""
    is_picture = PICTURE.search(spelling) is not None
    if ADDRESS.match(text) or WINDOWS.match(text) or text.lower().startswith("file://"):
        return len(first) == len(spelling) or is_picture
    is_word = not re.search(r"\s", spelling) or _words(text) == 1
    folder = Path(os.path.expanduser(spelling)).parent
    if "/" in spelling[1:] and folder.is_dir() and (is_picture or (is_word and "/" in first)):
        return True
    if re.match(r"~?/|\.{1,2}/", spelling):
        return is_picture or (is_word and "/" in spelling[1:])
    return is_word and is_picture and not spelling.startswith(".")


def refuse_no_file(path: Path, text: str = "") -> None:
    """Raises ValueError with what to do for a path that is no file; ``text``: what was typed."""
    text = (text or str(path)).strip()
    if ADDRESS.match(text) or re.match(r"https?:/", text):
        raise ValueError(
            f"{text}: is an address; download the picture and give the path of the file"
        )
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give the path of a picture")
    if _exists(path):
        return
    hint = ""
    if os.name != "nt" and WINDOWS.match(text):
        hint = " (a path of Windows; this machine has others)"
    elif not path.parent.is_dir():
        hint = f" (there is no folder {path.parent} either)"
    else:
        names = [p.name for p in path.parent.iterdir() if PICTURE.search(p.name)]
        if near := difflib.get_close_matches(path.name, names, n=3):
            hint = f"; did you mean {' or '.join(near)}?"
    raise ValueError(f"{path}: there is no such picture{hint or '; give the path of one'}")


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return False


def _words(text: str) -> int:
    """Words as a shell counts them: an escaped or quoted space ends none."""
    try:
        return len(shlex.split(text))
    except ValueError:
        return len(text.split())


def _spellings(text: str) -> list[str]:
    """What ``text`` may stand for, the likeliest last."""
    text = text.strip()
    found = [text]
    try:
        unquoted = shlex.split(text)
    except ValueError:  # a quote without its other half
        unquoted = []
    if len(unquoted) == 1 and not WINDOWS.match(text):
        found.append(unquoted[0])
    elif len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        found.append(text[1:-1])
    if "\\" in text:
        found.insert(1, text.replace("\\", "/"))  # pics\\dog.jpg, as Windows has it
    if found[-1].lower().startswith("file://"):
        # file:///photos/a%20dog.jpg; a host, as in file://localhost/…, is this machine.
        found.append(unquote(re.sub(r"^file://[^/]*", "", found[-1], flags=re.IGNORECASE)))
    return found

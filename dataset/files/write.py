"""Writing that survives a kill: a file holds its old content or its new content, never a part."""

from __future__ import annotations

import os
from pathlib import Path

from dataset.files.errors import DataError


def write_text(path: Path, text: str) -> None:
    """Atomic and durable: the file holds either the old or the new text. Raises OSError naming
    it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:  # The error of a full disk names no file, so this one adds it.
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def prepare_output(flag: str, path: Path | None, is_folder: bool = False) -> None:
    """Makes the folder of a file that a command will write, or the folder itself, before the work
    rather than after it. Raises DataError naming ``flag`` where nothing can be written."""
    if path is None:
        return
    folder = path if is_folder else path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "Permission denied"
        if not is_folder and path.is_dir():
            reason = "it is a folder"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        other = "another folder" if is_folder else "another file"
        raise DataError(f"{flag} {path}: results cannot be written there ({reason}); give {other}")


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

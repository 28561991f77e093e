"""Writing that survives a kill and a full disk: a file or folder holds its old content or its new
content, never a part."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cores.dataset.files.errors import DataError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def disk_error(error: BaseException) -> OSError | None:
    """``error`` as the OSError that it stands for, if it is what a writer made of one.

    safetensors and tokenizers say "I/O error: … (os error 28)", torch.save "[enforce fail at
    inline_container.cc:672] . unexpected pos 128 vs 0", numpy "640 requested and 128 written".
    """
    text = str(error)
    if found := re.search(r"\(os error (\d+)\)", text):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    torch = isinstance(error, RuntimeError) and re.search("inline_container|StreamWriter", text)
    if torch or re.fullmatch(r"\d+ requested and \d+ written", text):
        return OSError(errno.ENOSPC, "the disk seems to be full")
    return error if isinstance(error, OSError) else None


@contextmanager
def all_or_nothing(path: Path, partial: Path) -> Iterator[None]:
    """Around the writing of ``partial``, a file or folder that is to become ``path``: it is removed
    where that fails. Raises OSError naming ``path`` where the disk is to blame."""
    try:
        yield
    except BaseException as error:
        remove(partial)
        found = disk_error(error)
        # The error of a full disk names no file; one that names another file stays as it is.
        if found is None or found.errno is None:
            raise
        if found.filename is not None and not str(found.filename).startswith(str(partial)):
            raise
        raise OSError(found.errno, found.strerror, str(path)) from error


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yields the path of a file to write beside ``path``, which it replaces when it is on the disk.
    Raises OSError naming ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two programs may write the same file at once; the last one to end wins.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with all_or_nothing(path, partial):
        yield partial
        sync(partial)
        partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Atomic and durable: the file holds either the old or the new text. Raises OSError naming
    it."""
    with writing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def refuse_foreign(path: Path, begins: bytes, flag: str) -> None:
    """Raises ValueError where ``path``, a file to write, holds what does not begin as this program
    would write it: an input that was typed, or completed by the shell, behind the wrong flag."""
    try:
        with path.open("rb") as stream:
            found = stream.read(80).lstrip()
    except OSError:
        return  # It is not there, or its writer says what is wrong.
    if found and not found.startswith(begins):
        raise ValueError(
            f"{flag} {path}: is there and was not written by this command; give another name, or"
            " remove it"
        )


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


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

"""Names in files become paths that cannot leave their folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dataset.files.errors import DataError, MissingDataError


def named_inside(root: str | Path, name: str) -> Path:
    """The path ``root/name`` for a ``name`` that the user typed. It may be a link: large folders
    often are.

    Raises DataError for an empty or absolute name and for '..'.
    """
    relative = Path(name)
    if not name or "\0" in name or relative.is_absolute() or ".." in relative.parts:
        raise DataError(
            f"{root}: {name!r} is not a file name inside this folder; absolute names and '..' are"
            " refused"
        )
    return Path(root) / relative


def resolve_inside(root: str | Path, name: str) -> Path:
    """The path ``root/name`` for a ``name`` that was read from a file, if it stays inside ``root``.

    Raises DataError for an empty or absolute name, for '..', for a symbolic link that leaves
    ``root`` and for what no file can be called.
    """
    path = named_inside(root, name)
    try:
        leaves = not path.resolve().is_relative_to(Path(root).resolve())
        path.exists()
    # too long a name, a loop of links, half a character
    except (OSError, RuntimeError, UnicodeError) as error:
        raise DataError(
            f"{root}: {name!r} cannot be opened ({reason_of(error)}); correct the name"
        ) from None
    if leaves:
        raise DataError(
            f"{path}: is a link that leaves {root}; copy the file or link the whole folder"
        )
    return path


def require_folder(path: str | Path, what: str) -> Path:
    """``path`` as a Path, or a MissingDataError that says ``what`` is expected there."""
    path = Path(path)
    if not path.is_dir():
        reason = "is not a folder" if path.exists() else "does not exist"
        raise MissingDataError(f"{path}: {reason}; {what} is expected there (check --dataset_dir)")
    return path


def list_files(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """The files of ``folder`` with one of the lower-case ``suffixes``, sorted by name and not as
    the disk likes.

    Raises DataError for a symbolic link that leaves ``folder``.
    """
    wanted = tuple(suffixes)
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in wanted and not path.name.startswith(".")
    )
    return [resolve_inside(folder, path.name) if path.is_symlink() else path for path in found]


def reason_of(error: Exception) -> str:
    # which repeats the path
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split()) or type(error).__name__

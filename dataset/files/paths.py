"""Names in files become paths that cannot leave their folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dataset.files.errors import DataError, MissingDataError, reason_of


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
    except (OSError, RuntimeError, UnicodeError) as error:
        # The name is too long, is a loop of links or holds half of a surrogate pair.
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


def list_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files of ``folder`` with one of the lower-case ``suffixes``, sorted by name, so that
    the order is the same on every disk.

    Raises DataError for a symbolic link that leaves ``folder``.
    """
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in suffixes and not path.name.startswith(".")
    )
    return [resolve_inside(folder, path.name) if path.is_symlink() else path for path in found]

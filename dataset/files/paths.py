"""Names in files become paths that cannot leave their folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from cores.dataset.files.errors import DataError, MissingDataError, reason_of

# What systems and tools leave in folders; names that begin with a dot are left-overs, too.
LEFTOVERS = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle"}
LEFTOVERS |= {"$recycle.bin", "system volume information", "lost+found", "__pycache__", "icon\r"}

HANDED_OVER = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin", "/dev/null")


def is_leftover(name: str) -> bool:
    """Whether a file or folder of that name is none of the data: "__MACOSX", "._a.json"."""
    return name.startswith(".") or name.lower() in LEFTOVERS


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


def resolve_inside(root: str | Path, name: str, follow_links: bool = False) -> Path:
    """The path ``root/name`` for a ``name`` that was read from a file, if it stays inside ``root``.
    ``follow_links``: the file itself, or a folder on the way to it, may be a link to elsewhere.

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
    if leaves and not follow_links:
        raise DataError(
            f"{path}: is a link that leaves {root}; copy the file, link the whole folder, or trust"
            " its links with --follow_links (a folder of a hub's cache is made of them)"
        )
    return path


def typed_folder(text: str) -> Path:
    """The path that a flag or a setting names, with the ~ and the $VARIABLES that a shell would
    have replaced, had it seen them."""
    return Path(os.path.expandvars(os.path.expanduser(text)))


def refuse_endless(path: Path) -> None:
    """Raises DataError for a named pipe, a socket or a device, which would be waited for or read
    without end. What a shell hands over, as in ``--skip_list <(grep …)``, is read."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return  # Whoever opens it says why it cannot be.
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode) or str(path).startswith(HANDED_OVER):
        return
    raise DataError(f"{path}: is a pipe, a socket or a device, not a file; put a file there")


def require_folder(path: str | Path, what: str) -> Path:
    """``path`` as a Path, or a MissingDataError that says ``what`` is expected there."""
    path = Path(path)
    if not path.is_dir():
        reason = "is not a folder" if path.exists() else "does not exist"
        raise MissingDataError(f"{path}: {reason}; {what} is expected there (check --dataset_dir)")
    return path


def list_files(folder: Path, suffixes: Sequence[str], follow_links: bool = False) -> list[Path]:
    """The files of ``folder`` with one of the lower-case ``suffixes``, sorted by name, so that
    the order is the same on every disk. Left-overs of systems and tools are passed over.

    Raises DataError for a symbolic link that leaves ``folder``, unless ``follow_links``.
    """
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in suffixes and not is_leftover(path.name)
    )
    return [
        resolve_inside(folder, path.name, follow_links) if path.is_symlink() else path
        for path in found
    ]


def list_folders(folder: Path) -> list[Path]:
    """The folders in ``folder``, if it is one, sorted by name, without left-overs."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not is_leftover(p.name))

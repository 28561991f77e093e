"""Whether the files of a checkpoint are what was written: sizes, checksums, plausible values.

torch.save writes checksums (a .pt file is a zip archive), but torch.load does not compare them. Our
own small JSONs hold theirs under "crc32"; those of older versions have none and are taken for what
they say, if it makes sense.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path, PurePath
from typing import Any

from cores.dataset.files.sealed import read_sealed
from cores.utils import distributed

PROGRESS, FILES = "progress.json", "files.json"


def read_progress(folder: Path) -> dict[str, Any] | None:
    """The progress.json of a checkpoint; None if there is none or it is damaged."""
    try:
        progress = read_sealed(folder / PROGRESS)
    except (OSError, ValueError):
        return None
    return progress if _plausible(progress) else None


def _plausible(progress: dict[str, Any]) -> bool:
    def count(name: str, least: int, optional: bool = False) -> bool:
        value = progress.get(name)
        if value is None:
            return optional
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    recent = progress.get("recent", [])
    known = {"epoch", "step", "best", "best_step", "recent", "world_size", "images_per_step"}
    return (
        progress.keys() <= known
        and count("epoch", 0)
        and count("step", 0)
        and count("world_size", 1)
        and count("best_step", 0, optional=True)
        and count("images_per_step", 1, optional=True)
        and isinstance(progress.get("best"), (float, int, type(None)))
        and isinstance(recent, list)
        and all(isinstance(loss, (float, int)) and math.isfinite(loss) for loss in recent)
    )


def faults(folder: Path) -> list[str]:
    """What is wrong with the files of a checkpoint, one line each. Every rank calls it; they divide
    the reading, and every rank gets all lines."""
    found, sizes = [], {}
    try:
        sizes = _sizes(folder)
    except ValueError as error:
        found = [str(error)]
    if (sizes or (folder / PROGRESS).is_file()) and read_progress(folder) is None:
        found.insert(0, f"{folder / PROGRESS}: missing or damaged")
    names = sorted(sizes.keys() | {str(p.relative_to(folder)) for p in folder.rglob("*.pt")})
    for name in names[distributed.rank() :: distributed.world_size()]:
        if fault := _fault(folder / name, sizes.get(name)):
            found.append(f"{folder / name}: {fault}")
    return list(dict.fromkeys(distributed.gather_lists(found)))


def _sizes(folder: Path) -> dict[str, int]:
    """The content of files.json, {} where there is none: checkpoints did not always have one, and
    those of other programs do not. Raises ValueError."""
    try:
        sizes = read_sealed(folder / FILES)
    except FileNotFoundError:
        return {}
    inside = all(not PurePath(n).is_absolute() and ".." not in PurePath(n).parts for n in sizes)
    counted = all(type(size) is int and size >= 0 for size in sizes.values())
    if not (inside and counted and any(name.endswith("_states.pt") for name in sizes)):
        raise ValueError(f"{folder / FILES}: damaged (not a list of a checkpoint's files)")
    return sizes


def _fault(file: Path, size: int | None) -> str:
    if not file.is_file():
        return "missing"
    if size is not None and file.stat().st_size != size:
        return f"cut off: {file.stat().st_size} of {size} bytes"
    if file.suffix != ".pt":
        return ""
    try:
        with file.open("rb") as stream:
            # Files of other programs may have torch's old format, which has no checksums.
            if size is None and stream.read(2) == b"\x80\x02":
                return ""
        with zipfile.ZipFile(file) as archive:
            return "damaged" if archive.testzip() else ""
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        NotImplementedError,
        RuntimeError,  # A flipped bit says that the content is encrypted.
        ValueError,
    ):
        return "damaged"

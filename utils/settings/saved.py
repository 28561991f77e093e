"""The settings that a run saved: config.json in its folder, and copies with a checksum in its
checkpoints, which stand for a config.json that is damaged or gone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from cores.dataset.files.sealed import read_sealed
from cores.utils.settings.flags import UsageError

logger = logging.getLogger(__name__)

CONFIG, COPY = "config.json", "settings.json"
CHECKPOINTS = ("last", "last.old", "best", "best.old")


def run_of(path: str | Path) -> Path | None:
    """The run folder that ``path`` is, or that it is a checkpoint or the ckpt folder of."""
    path = Path(path).resolve()
    for folder in (path, path.parent, path.parent.parent):
        ckpt = folder / "ckpt"
        if ckpt.is_dir() and ((folder / CONFIG).is_file() or any(ckpt.glob("*/progress.json"))):
            return folder
    return None


def _copies(run: Path) -> list[Path]:
    files = (run / "ckpt" / name / COPY for name in CHECKPOINTS)
    return [file for file in files if file.is_file()]


def read_settings(
    run: Path, fits: Callable[[str, Any], bool], fixed: Collection[str]
) -> dict[str, Any]:
    """The settings of the run folder ``run``.

    ``fits``: whether a setting may have a value. ``fixed``: settings that never change in a run, so
    that a config.json that contradicts its copy is refused. Raises UsageError naming the file.
    """
    copy: dict[str, Any] = {}
    for file in _copies(run):
        try:
            copy = _checked(file, fits)
            break
        except ValueError as error:
            logger.warning("%s", error)
    try:
        values = _checked(run / CONFIG, fits)
    except FileNotFoundError:
        reason = f"{run / CONFIG}: not found"
    except ValueError as error:
        reason = str(error)
    else:
        for name in sorted(fixed & copy.keys()):
            if values.get(name, copy[name]) != copy[name] or name not in values:
                raise UsageError(
                    f"{run / CONFIG}: says {name} {values.get(name)!r}, but {file} that the run was"
                    f" trained with {copy[name]!r}; remove the former, and the latter is used"
                )
        return values
    if copy:
        logger.warning("%s; its copy %s is used", reason, file)
        return copy
    raise UsageError(
        f"{reason}; restore it. Without it, train_ds.py continues with the flags of the run and"
        f" --accept_changes, and merging takes --weight {run / 'ckpt' / 'best' / 'state'} with them"
    )


def _checked(file: Path, fits: Callable[[str, Any], bool]) -> dict[str, Any]:
    """Raises FileNotFoundError, or ValueError naming the file."""
    values = read_sealed(file)
    for name, value in values.items():
        if not fits(name, value):
            raise ValueError(f"{file}: damaged ({name} is {value!r})")
    if "version" not in values:
        raise ValueError(f'{file}: damaged (it holds no settings of a run, "version" is missing)')
    return values

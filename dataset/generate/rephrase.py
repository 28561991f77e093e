"""Other wordings of the queries of a data set in ReasonSeg's layout, added to "text" behind the
original ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from cores.dataset.conversation.wordings import is_sentence
from cores.dataset.files.errors import DataError
from cores.dataset.files.images import IMAGE_SUFFIXES
from cores.dataset.files.paths import list_files, require_folder
from cores.dataset.generate import checks, prompts
from cores.dataset.generate.ask import CheckedEntries, ask_for_list
from cores.dataset.generate.client import ChatModel
from cores.dataset.generate.run import write_json
from cores.dataset.readers.reasoning import read_record


def read_queries(folder: Path) -> list[tuple[Path, dict]]:
    """(file, checked record) of every query, sorted by name. Raises DataError."""
    require_folder(folder, "a split of a data set in ReasonSeg's layout")
    found = [(path, read_record(path)) for path in list_files(folder, (".json",))]
    if not found:
        raise DataError(
            f"{folder}: holds no query; a split such as reason_seg/ReasonSeg/train is expected"
        )
    return found


def reword(name: str, record: dict, count: int, chat: ChatModel, rounds: int) -> CheckedEntries:
    """``count`` new wordings of the first text of ``record``, or as many as pass the checks. Raises
    ChatError, Abort."""
    texts = [" ".join(text.split()) for text in record["text"]]
    original = texts[0]
    length = len(original.split())
    whole = is_sentence(original)
    # Of few words, one that differs is a lot, so a short wording only must not be the same.
    check_other = checks.check_new if length > 4 else checks.check_different

    def check(wording: Any, accepted: list[Any]) -> str | None:
        reason = checks.check_length(wording, max(1, length // 3), 2 * length + 8, "wording")
        if reason:
            return reason
        if is_sentence(wording.strip()) != whole:
            form = "be a whole sentence" if whole else "stay a phrase, without a final sign"
            return f"the wording must {form}"
        return (
            checks.check_plain(wording, "wording")
            or checks.check_telling_words(wording, original)
            or (None if checks.check_leak(original) else checks.check_leak(wording))
            or check_other(wording, [*texts, *accepted], "wording")
        )

    def missing(accepted: list[Any]) -> str:
        left = count - len(accepted)
        return f"{left} in number" if left > 0 else ""

    messages = prompts.rephrase_messages(original, count)
    result = ask_for_list(chat, "rephrase", name, messages, "wordings", check, missing, rounds)
    result.accepted = [" ".join(wording.split()) for wording in result.accepted]
    return result


def write_split(
    source: Path,
    queries: list[tuple[Path, dict]],
    wordings: list[CheckedEntries | None],
    out: Path,
) -> int:
    """Writes the split with the new wordings to ``out`` and links its pictures there; returns how
    many wordings are new."""
    out.mkdir(parents=True, exist_ok=True)
    for picture in list_files(source, IMAGE_SUFFIXES):
        _link(picture, out / picture.name)
    count = 0
    for (path, record), result in zip(queries, wordings, strict=True):
        new = result.accepted if result else []
        count += len(new)
        write_json(out / path.name, record | {"text": [*record["text"], *new]})
    return count


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:  # the target is on another disk, or its file system has no links
        partial = target.with_name(f".{target.name}.partial")
        shutil.copyfile(source, partial)
        os.replace(partial, target)

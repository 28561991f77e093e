"""Other wordings of the queries of a data set in ReasonSeg's layout, added to "text" behind the
original ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from dataset.files.errors import DataError
from dataset.files.images import IMAGE_SUFFIXES
from dataset.files.paths import list_files, require_folder
from dataset.files.text import read_json
from dataset.generate import checks, prompts
from dataset.generate.client import Chat
from dataset.generate.talk import Talk, talk
from dataset.generate.work import write_json
from dataset.readers.reasoning import read_record


def read_queries(folder: Path) -> list[tuple[Path, dict]]:
    """(file, checked record) of every query, sorted by name. Raises DataError."""
    require_folder(folder, "a split of a data set in ReasonSeg's layout")
    found = [(path, read_record(path)) for path in list_files(folder, (".json",))]
    if not found:
        raise DataError(
            f"{folder}: holds no query; a split such as reason_seg/ReasonSeg/train is expected"
        )
    return found


def reword(name: str, record: dict, count: int, chat: Chat, rounds: int) -> Talk:
    """``count`` new wordings of the first text of ``record``, or as many as pass the checks. Raises
    ChatError, Abort."""
    texts = [" ".join(text.split()) for text in record["text"]]
    original = texts[0]
    length = len(original.split())
    is_sentence = original[-1] in ".?!"

    def check(wording: Any, accepted: list[Any]) -> str | None:
        reason = checks.check_length(wording, max(1, length // 3), 2 * length + 8, "wording")
        if reason:
            return reason
        if (wording.strip()[-1] in ".?!") != is_sentence:
            return (
                "the wording must"
                f" {'be a whole sentence' if is_sentence else 'stay a phrase, without a final sign'}"
            )
        reason = checks.check_plain(wording, "wording") or checks.check_telling_words(
            wording, original
        )
        leak = None if checks.check_leak(original) else checks.check_leak(wording)
        # for phrases of few words a single other word is a lot
        others = [*texts, *accepted]
        same = (
            checks.check_new(wording, others, "wording")
            if length > 4
            else checks.check_different(wording, others, "wording")
        )
        return reason or leak or same

    def missing(accepted: list[Any]) -> str:
        left = count - len(accepted)
        return f"{left} in number" if left > 0 else ""

    result = talk(
        chat,
        "rephrase",
        name,
        prompts.rephrase_messages(original, count),
        "wordings",
        check,
        missing,
        rounds,
    )
    result.accepted = [" ".join(wording.split()) for wording in result.accepted]
    return result


def write_split(
    source: Path, queries: list[tuple[Path, dict]], talks: list[Talk | None], out: Path
) -> int:
    """Writes the split with the new wordings to ``out`` and links its pictures there; returns how
    many wordings are new."""
    out.mkdir(parents=True, exist_ok=True)
    for picture in list_files(source, IMAGE_SUFFIXES):
        _link(picture, out / picture.name)
    count = 0
    for (path, record), result in zip(queries, talks, strict=True):
        new = result.accepted if result else []
        count += len(new)
        # the file as it is, but for its texts
        write_json(out / path.name, read_json(path) | {"text": [*record["text"], *new]})
    return count


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:  # another disk
        partial = target.with_name(f".{target.name}.partial")
        shutil.copyfile(source, partial)
        os.replace(partial, target)

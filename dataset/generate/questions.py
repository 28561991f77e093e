"""Questions about the marked objects of photographs: the data pipeline of LLM-Seg40K, which was
published without it.

Result, in the layout of LLM-Seg40K (dataset/readers/llm_seg40k.py reads it)::

    <out>/{train,validation,test}.json
    {photo: {"from_dataset": …, "qa_pairs": [pair, …]}, …}
    pair: {"question", "answer", "rle_seg", "object", "annotation_ids"}

"object" and "annotation_ids" say where a mask is from; readers ignore them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cores.dataset.conversation.exemplars import normalise
from cores.dataset.generate import checks, prompts
from cores.dataset.generate.ask import ask_for_list
from cores.dataset.generate.client import ChatModel, Request, image_part
from cores.dataset.generate.run import write_json
from cores.dataset.generate.scenes import MarkedObject, Photograph

SPLITS = ("train", "validation", "test")
SUMMARY_WORDS = (15, 250)


@dataclass(frozen=True)
class QuestionOptions:
    """Which objects are asked about, and what a question must keep to."""

    objects: int = 4
    """Most objects of an image that are asked about: the largest."""
    least_share: float = 0.002
    """Smaller objects, as part of the image's area, are not asked about."""
    most_share: float = 0.8
    """Neither are larger ones."""
    rounds: int = 2
    """How often the model is asked before an object is given up."""
    allow_names: bool = False
    """A question may name its object."""
    most_repeats: int = 3
    """How often the same question may be asked in the whole data set."""

    def __post_init__(self):
        """Raises ValueError."""
        if not 0 <= self.least_share < self.most_share <= 1:
            raise ValueError(
                f"--least_share {self.least_share} and --most_share {self.most_share} must be 0 <="
                " least < most <= 1"
            )


@dataclass(frozen=True)
class Asked:
    """What came of one photograph."""

    photograph: Photograph
    pairs: list[dict[str, Any]]
    refused: list[str] = field(default_factory=list)


def ask_about(
    photograph: Photograph,
    captioner: ChatModel | None,
    chat: ChatModel,
    side: int,
    options: QuestionOptions,
) -> Asked:
    """Questions about ``photograph``. ``captioner``: None to go without a summary. ``side``: see
    ``client.image_part``.

    Raises DataError, ChatError, Abort.
    """
    found = photograph.objects()
    fitting = [o for o in found if options.least_share <= o.share <= options.most_share]
    objects = fitting[: options.objects]
    if not objects:
        return Asked(photograph, [], ["no object of a fitting size"])
    others = sorted({*(o.name for o in found), *photograph.others} - {o.name for o in objects})
    summary = describe_photograph(photograph, captioner, side, options.rounds) if captioner else ""
    if summary is None:
        return Asked(photograph, [], ["no usable summary"])
    by_name = {o.name.lower(): o for o in objects}

    def check(entry: Any, accepted: list[Any]) -> str | None:
        return check_pair(entry, accepted, by_name, options.allow_names)

    def missing(accepted: list[Any]) -> str:
        done = {object_name(entry) for entry in accepted}
        left = [o.name for o in objects if o.name.lower() not in done]
        return f"for these things only: {', '.join(left)}" if left else ""

    messages = prompts.question_messages(summary, objects, others)
    result = ask_for_list(
        chat, "questions", photograph.name, messages, "pairs", check, missing, options.rounds
    )
    pairs = []
    for target in objects:
        for entry in result.accepted:
            if by_name[object_name(entry)] is target:
                texts = {key: " ".join(entry[key].split()) for key in ("question", "answer")}
                mask = {"rle_seg": target.rle, "object": target.name}
                pairs.append(texts | mask | {"annotation_ids": list(target.annotation_ids)})
    return Asked(photograph, pairs, result.refused)


def describe_photograph(
    photograph: Photograph, captioner: ChatModel, side: int, rounds: int
) -> str | None:
    """A summary of what the photograph shows; None where no try gives a usable one."""
    part, images = image_part(photograph.path, side)
    messages = prompts.caption_messages(part)
    least, most = SUMMARY_WORDS
    stand_in = "word " * 120  # as long as CAPTION allows
    for number in range(rounds):
        more = rounds - 1 - number
        request = Request("caption", photograph.name, messages, images, number, more, stand_in)
        answer = captioner.ask(request)
        text = " ".join(answer.text.split())
        # A summary that is cut off is still one, up to its last whole sentence.
        text = text[: text.rfind(".") + 1] if answer.finish == "length" else text
        if checks.check_length(text, least, most, "summary") is None:
            return text
    return None


def object_name(entry: Any) -> str:
    """The object that a pair says it is about, in lower case; "" where it says none."""
    name = entry.get("object") if isinstance(entry, dict) else None
    return " ".join(name.lower().split()) if isinstance(name, str) else ""


def check_pair(
    entry: Any, accepted: Sequence[Any], objects: dict[str, MarkedObject], allow_names: bool = False
) -> str | None:
    """Why a pair is refused, or None. ``objects``: those asked about, by name in lower case."""
    name = object_name(entry)
    target = objects.get(name)
    if target is None:
        return f'a pair is about none of the things ("{name}")'
    question, answer = entry.get("question"), entry.get("answer")
    twice = name in map(object_name, accepted)
    reason = (
        checks.check_length(question, 6, 35, "question")
        or checks.check_length(answer, 6, 40, "answer")
        or checks.check_plain(question, "question")
        or checks.check_plain(answer, "answer")
        or checks.check_leak(question)
        or checks.check_answer_names(answer, target.names)
        or (None if allow_names else checks.check_unnamed(question, target.names))
        or ("a second question about it" if twice else None)
        or checks.check_new(question, [other["question"] for other in accepted], "question")
    )
    return f"{target.name}: {reason}" if reason else None


def without_repeats(asked: Iterable[Asked], most: int) -> list[Asked]:
    """Leaves out a question that was asked ``most`` times before it."""
    counts: Counter[str] = Counter()
    result = []
    for one in asked:
        pairs, refused = [], list(one.refused)
        for pair in one.pairs:
            question = normalise(pair["question"])
            counts[question] += 1
            if counts[question] <= most:
                pairs.append(pair)
            else:
                refused.append(f"{pair['object']}: the question was asked in {most} other images")
        result.append(Asked(one.photograph, pairs, refused))
    return result


def split_of(name: str, validation: float, test: float) -> str:
    """The split of a photo: a function of its name alone, so that it stays where it is when the
    data grow."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "test" if place < test else "validation" if place < test + validation else "train"


def write_splits(
    asked: Iterable[Asked], out: Path, validation: float, test: float
) -> dict[str, int]:
    """Writes the splits that hold a question; returns the number of questions by split."""
    content: dict[str, dict[str, Any]] = {split: {} for split in SPLITS}
    counts = dict.fromkeys(SPLITS, 0)
    for one in sorted(asked, key=lambda one: one.photograph.name):
        if one.pairs:
            name, kind = one.photograph.name, one.photograph.source.kind
            split = split_of(name, validation, test)
            content[split][name] = {"from_dataset": kind, "qa_pairs": one.pairs}
            counts[split] += len(one.pairs)
    for split, entries in content.items():
        if entries:
            write_json(out / f"{split}.json", entries)
        else:
            (out / f"{split}.json").unlink(missing_ok=True)  # Written by a run with other flags.
    return counts

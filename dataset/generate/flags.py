"""The flags of python -m dataset.generate."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cores.dataset import command
from cores.dataset.conversation.exemplars import LIBRARY_PATH
from cores.dataset.generate.questions import QuestionOptions
from cores.dataset.generate.scenes import KINDS, AnnotationSource, parse_wanted


def _at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return whole_number


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object such as {{"top_p": 0.9}}')
    return value


def build_parser() -> command.Parser:
    """The parser of all three commands."""
    about = "Data made with a language model; docs/generate.md explains it."
    parser = command.Parser(about, "python -m dataset.generate")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=command.Parser)

    what = "questions about marked objects, as LLM-Seg40K"
    sub = commands.add_parser("questions", help=what)
    _add_questions(sub)
    _add_common(sub)

    what = "more pairs for the exemplar library"
    sub = commands.add_parser("exemplars", help=what)
    add = sub.add_argument
    add("--library", type=Path, default=LIBRARY_PATH, help="JSON that is continued")
    add("--domains", help="domains joined by commas (default: those of the library)")
    add("--per_domain", type=_at_least(1), default=10, help="new pairs in every domain")
    _add_common(sub)

    what = "other wordings of a split in ReasonSeg's layout"
    sub = commands.add_parser("rephrase", help=what)
    add = sub.add_argument
    what = "split folder, such as data/reason_seg/ReasonSeg/train"
    add("--data", type=Path, required=True, help=what)
    add("--wordings", type=_at_least(1), default=4, help="new wordings of every query")
    _add_common(sub)
    return parser


def _add_questions(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    what = (
        "coco or ego_objects; instances in COCO's format; folder of the images; optionally which,"
        " such as 2-5:6000,6-:4000 for 6000 images with 2 to 5 categories and 4000 with 6 or more"
        " (default 2-); may be given several times"
    )
    add("--source", nargs="+", action="append", required=True, metavar="KIND", help=what)
    what = "chat: an endpoint; none; module:function for a local model"
    add("--captioner", default="chat", help=what)
    what = "model of the captioner (default: --model), or its folder"
    add("--captioner_model", default="", help=what)
    add("--captioner_url", default="", help="endpoint of the captioner (default: --base_url)")
    what = "like --api_key_env; that one unless --captioner_url is given"
    add("--captioner_key_env", default="", help=what)
    add("--captioner_price_in", type=_amount, help="like --price_in, for the captioner")
    add("--captioner_price_out", type=_amount, help="like --price_out, for the captioner")
    what = "longest side of the pictures sent, in pixels"
    add("--image_side", type=_at_least(16), default=1024, help=what)
    add("--tokens_per_image", type=_at_least(0), default=765, help="for the estimate")
    default = QuestionOptions()
    for name, of, what in (
        ("objects", _at_least(1), "most objects asked about in an image"),
        ("least_share", _amount, "smallest object, as part of the image"),
        ("most_share", _amount, "largest object, as part of the image"),
        ("most_repeats", _at_least(1), "how often one question may occur"),
    ):
        add(f"--{name}", type=of, default=getattr(default, name), help=what)
    add("--allow_names", action="store_true", help="a question may name its object")
    add("--validation", type=_amount, default=0.1, help="part of the images for validation.json")
    add("--test", type=_amount, default=0.1, help="part of the images for test.json")


def _add_common(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    what = "what to write; journal and report go to <out>.generation/"
    add("--out", type=Path, required=True, help=what)
    what = "only say how many requests, tokens and dollars are left"
    add("--dry_run", action="store_true", help=what)
    what = "how often the model is asked before an item is given up"
    add("--rounds", type=_at_least(1), default=2, help=what)

    add = command.add_argument_group("endpoint").add_argument
    add("--base_url", default="http://localhost:8000/v1", help="OpenAI-compatible endpoint")
    add("--model", required=True, help="name of the model")
    what = "environment variable that holds the key"
    add("--api_key_env", default="OPENAI_API_KEY", help=what)
    add("--max_tokens", type=_at_least(1), default=1200, help="longest answer")
    add("--temperature", type=_amount, default=0.7)
    what = "of the choice of images and, where it is honoured, of the model"
    add("--seed", type=_at_least(0), default=0, help=what)
    what = "JSON object of further request fields; null removes one"
    add("--extra", type=_object, default={}, help=what)
    add("--price_in", type=_amount, default=0.0, help="US dollars per million tokens sent")
    add("--price_out", type=_amount, default=0.0, help="US dollars per million tokens received")

    add = command.add_argument_group("pace").add_argument
    add("--requests_per_minute", type=_amount, default=60.0, help="0: no limit")
    add("--concurrent", type=_at_least(1), default=4, help="requests under way at a time")
    add("--timeout", type=_amount, default=120.0, help="seconds for a whole reply")
    what = "further attempts after an error that may pass"
    add("--retries", type=_at_least(0), default=6, help=what)
    what = "seconds before the first of them; doubles with each"
    add("--backoff", type=_amount, default=1.0, help=what)
    what = "longest pause that a server may ask for, in seconds"
    add("--max_wait", type=_amount, default=600.0, help=what)
    what = "failed items in a row that end the run"
    add("--give_up_after", type=_at_least(1), default=10, help=what)
    add("--quiet", action="store_true", help="no progress bar")


def read_source(values: list[str]) -> AnnotationSource:
    """One --source. Raises ValueError."""
    if len(values) not in (3, 4) or values[0] not in KINDS:
        raise ValueError(
            f"--source {' '.join(values)}: give {' or '.join(KINDS)}, a JSON file, a folder of"
            " images and, if wanted, which"
        )
    source = AnnotationSource(values[0], Path(values[1]), Path(values[2]))
    return replace(source, wanted=parse_wanted(values[3])) if len(values) == 4 else source

"""The flags of python -m dataset.generate."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dataset.conversation.exemplars import LIBRARY_PATH
from dataset.generate.questions import QuestionOptions
from dataset.generate.scenes import KINDS, Source, parse_wanted


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the flags")


def _whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return whole


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


def build_parser() -> argparse.ArgumentParser:
    about = "Data made with a language model; docs/generate.md explains it."
    parser = _Parser(prog="python -m dataset.generate", description=about, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    command = commands.add_parser(
        "questions", help="questions about marked objects, as LLM-Seg40K", allow_abbrev=False
    )
    _add_questions(command)
    _add_common(command)
    command = commands.add_parser(
        "exemplars", help="more pairs for the exemplar library", allow_abbrev=False
    )
    command.add_argument(
        "--library", type=Path, default=LIBRARY_PATH, help="JSON that is continued"
    )
    command.add_argument(
        "--domains", help="domains joined by commas (default: those of the library)"
    )
    command.add_argument(
        "--per_domain", type=_whole(1), default=10, help="new pairs in every domain"
    )
    _add_common(command)
    command = commands.add_parser(
        "rephrase", help="other wordings of a split in ReasonSeg's layout", allow_abbrev=False
    )
    command.add_argument(
        "--data",
        type=Path,
        required=True,
        help="split folder, such as data/reason_seg/ReasonSeg/train",
    )
    command.add_argument(
        "--wordings", type=_whole(1), default=4, help="new wordings of every query"
    )
    _add_common(command)
    return parser


def _add_questions(command: argparse.ArgumentParser) -> None:
    what = (
        "coco or ego_objects; instances in COCO's format; folder of the images; optionally which,"
        " such as 2-5:6000,6-:4000 for "
    )
    what += (
        "6000 images with 2 to 5 categories and 4000 with 6 or more (default 2-); may be given"
        " several times"
    )
    names = ("KIND", "ANNOTATIONS", "IMAGES")
    command.add_argument(
        "--source", nargs="+", action="append", required=True, metavar=names[0], help=what
    )
    command.add_argument(
        "--captioner",
        default="chat",
        help="chat: an endpoint; none; module:function for a local model",
    )
    command.add_argument(
        "--captioner_model",
        default="",
        help="model of the captioner (default: --model), or its folder",
    )
    command.add_argument(
        "--captioner_url", default="", help="endpoint of the captioner (default: --base_url)"
    )
    command.add_argument(
        "--captioner_key_env",
        default="",
        help="like --api_key_env; that one unless --captioner_url is given",
    )
    command.add_argument(
        "--captioner_price_in", type=_amount, help="like --price_in, for the captioner"
    )
    command.add_argument(
        "--captioner_price_out", type=_amount, help="like --price_out, for the captioner"
    )
    command.add_argument(
        "--image_side",
        type=_whole(16),
        default=1024,
        help="longest side of the pictures sent, in pixels",
    )
    command.add_argument("--tokens_per_image", type=_whole(0), default=765, help="for the estimate")
    defaults = QuestionOptions()
    command.add_argument(
        "--objects",
        type=_whole(1),
        default=defaults.objects,
        help="most objects asked about in an image",
    )
    command.add_argument(
        "--least_share",
        type=_amount,
        default=defaults.least_share,
        help="smallest object, as part of the image",
    )
    command.add_argument(
        "--most_share",
        type=_amount,
        default=defaults.most_share,
        help="largest object, as part of the image",
    )
    command.add_argument(
        "--most_repeats",
        type=_whole(1),
        default=defaults.most_repeats,
        help="how often one question may occur",
    )
    command.add_argument(
        "--allow_names", action="store_true", help="a question may name its object"
    )
    command.add_argument(
        "--validation", type=_amount, default=0.1, help="part of the images for validation.json"
    )
    command.add_argument(
        "--test", type=_amount, default=0.1, help="part of the images for test.json"
    )


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        help="what to write; journal and report go to <out>.generation/",
    )
    command.add_argument(
        "--dry_run",
        action="store_true",
        help="only say how many requests, tokens and dollars are left",
    )
    command.add_argument(
        "--rounds",
        type=_whole(1),
        default=2,
        help="how often the model is asked before an item is given up",
    )
    group = command.add_argument_group("endpoint")
    group.add_argument(
        "--base_url", default="http://localhost:8000/v1", help="OpenAI-compatible endpoint"
    )
    group.add_argument("--model", required=True, help="name of the model")
    group.add_argument(
        "--api_key_env", default="OPENAI_API_KEY", help="environment variable that holds the key"
    )
    group.add_argument("--max_tokens", type=_whole(1), default=1200, help="longest answer")
    group.add_argument("--temperature", type=_amount, default=0.7)
    group.add_argument(
        "--seed",
        type=_whole(0),
        default=0,
        help="of the choice of images and, where it is honoured, of the model",
    )
    group.add_argument(
        "--extra",
        type=_object,
        default={},
        help="JSON object of further request fields; null removes one",
    )
    group.add_argument(
        "--price_in", type=_amount, default=0.0, help="US dollars per million tokens sent"
    )
    group.add_argument(
        "--price_out", type=_amount, default=0.0, help="US dollars per million tokens received"
    )
    group = command.add_argument_group("pace")
    group.add_argument("--requests_per_minute", type=_amount, default=60.0, help="0: no limit")
    group.add_argument(
        "--concurrent", type=_whole(1), default=4, help="requests under way at a time"
    )
    group.add_argument("--timeout", type=_amount, default=120.0, help="seconds for a whole reply")
    group.add_argument(
        "--retries", type=_whole(0), default=6, help="further attempts after an error that may pass"
    )
    group.add_argument(
        "--backoff",
        type=_amount,
        default=1.0,
        help="seconds before the first of them; doubles with each",
    )
    group.add_argument(
        "--max_wait",
        type=_amount,
        default=600.0,
        help="longest pause that a server may ask for, in seconds",
    )
    group.add_argument(
        "--give_up_after", type=_whole(1), default=10, help="failed items in a row that end the run"
    )
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def read_source(values: list[str]) -> Source:
    """One --source. Raises ValueError."""
    if len(values) not in (3, 4) or values[0] not in KINDS:
        kinds = " or ".join(KINDS)
        raise ValueError(
            f"--source {' '.join(values)}: give {kinds}, a JSON file, a folder of images and, if"
            " wanted, which"
        )
    wanted = {"wanted": parse_wanted(values[3])} if len(values) == 4 else {}
    return Source(values[0], Path(values[1]), Path(values[2]), **wanted)

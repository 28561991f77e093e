"""``cores COMMAND …``: every program of the project under one name.

Each is the ``main`` of a program that the repository also starts by its file, as in ``python
train_ds.py``, with the same flags. Nothing but the one asked for is imported.
"""

from __future__ import annotations

import difflib
import sys
from functools import partial
from importlib import import_module
from typing import NamedTuple, NoReturn

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

from cores import __version__


class Command(NamedTuple):
    """A program: what it is for, and where its ``main`` is."""

    about: str
    module: str
    read: str = ""
    """What reads its flags, "module:function", where the module takes seconds to import."""
    given: tuple[str, ...] = ()
    """What stands before the arguments, for a program with commands of its own."""


_PROGRAMS = "cores.utils.settings.programs:"
_MEASURE = "cores.utils.evaluation.cli"
COMMANDS = {
    "train": Command(
        "train a model, or measure one with --eval_only",
        "cores.train_ds",
        f"{_PROGRAMS}read_training",
    ),
    "eval": Command("measure a model or a run", _MEASURE),
    "score": Command("score another system's masks", _MEASURE, given=("score",)),
    "compare": Command("compare two results", _MEASURE, given=("compare",)),
    "merge": Command(
        "save a run as one model folder",
        "cores.merge_lora_weights_and_save_hf_model",
        f"{_PROGRAMS}read_merge",
    ),
    "chat": Command("ask about pictures in a terminal", "cores.chat", f"{_PROGRAMS}read_chat"),
    "app": Command("ask about pictures on a web page", "cores.app", f"{_PROGRAMS}read_page"),
    "predict": Command(
        "ask about many pictures, into files", "cores.utils.predicting", f"{_PROGRAMS}read_predict"
    ),
    "serve": Command(
        "answer other programs by OpenAI's protocol",
        "cores.utils.serving.api",
        f"{_PROGRAMS}read_serve",
    ),
    "push": Command("put a model folder on the hub", "cores.utils.push"),
    "check": Command("look data sets over before a training", "cores.dataset.check"),
    "synthetic": Command("write the drawn data set SynthReason", "cores.dataset.synthetic.write"),
    "generate": Command("let a language model write questions", "cores.dataset.generate.__main__"),
    "boxes": Command(
        "turn boxes into masks with SAM",
        "cores.utils.precompute.boxes_to_masks",
        f"{_PROGRAMS}read_boxes",
    ),
    "proposals": Command(
        "write SAM's mask proposals of a data set",
        "cores.utils.precompute.proposals",
        f"{_PROGRAMS}read_proposals",
    ),
    "cache": Command(
        "write SAM's image embeddings of a data set",
        "cores.utils.precompute.sam_cache",
        f"{_PROGRAMS}read_sam_cache",
    ),
    "curve": Command(
        "draw the curves of runs", "cores.utils.training.curve", f"{_PROGRAMS}read_curve"
    ),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {entry.about}" for name, entry in COMMANDS.items())
    return "\n".join(
        ["usage: cores COMMAND [flags]", "", *lines, "", "cores COMMAND --help lists its flags."]
    )


@command.entry()
def main(argv: list[str] | None = None) -> int:
    """Runs the command that ``argv`` (default: of this process) begins with; its exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"cores {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "cores --help lists them"
        raise ValueError(f"there is no command {command.shown(name)!r}; {hint}")
    entry = COMMANDS[name]
    rest = [*entry.given, *rest]
    sys.argv = [f"cores {name}", *rest]
    if entry.read:
        module, reader = entry.read.split(":")
        command.refuse_flags(partial(getattr(import_module(module), reader), rest))
    return import_module(entry.module).main(rest) or 0


def start() -> NoReturn:
    """The command ``cores``, as installing puts it on the path."""
    command.guard()
    command.leave(main())


if __name__ == "__main__":
    command.leave(main())

"""``cores COMMAND …``: every program of the project under one name.

Each is the ``main`` of a program that the repository also starts by its file, as in ``python
train_ds.py``, with the same flags. Nothing but the one asked for is imported.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NamedTuple

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

from cores import __version__


class Command(NamedTuple):
    """A program: what it is for, in words, and the module with its ``main``."""

    about: str
    module: str
    given: tuple[str, ...] = ()
    """What stands before the arguments, for a program with commands of its own."""


COMMANDS = {
    "train": Command("train a model, or measure one with --eval_only", "cores.train_ds"),
    "eval": Command("measure a trained run on other data", "cores.utils.evaluation.cli"),
    "score": Command("score another system's masks", "cores.utils.evaluation.cli", ("score",)),
    "compare": Command("compare two results", "cores.utils.evaluation.cli", ("compare",)),
    "merge": Command(
        "save a run as one model folder", "cores.merge_lora_weights_and_save_hf_model"
    ),
    "push": Command("put a model folder on the hub", "cores.utils.push"),
    "chat": Command("ask questions about a picture in the terminal", "cores.chat"),
    "app": Command("the same as a web page", "cores.app"),
    "check": Command("look over data sets before training", "cores.dataset.check"),
    "synthetic": Command("write the drawn data set SynthReason", "cores.dataset.synthetic.write"),
    "generate": Command("write questions with a language model", "cores.dataset.generate.__main__"),
    "boxes": Command("turn boxes into masks with SAM", "cores.utils.precompute.boxes_to_masks"),
    "proposals": Command(
        "write SAM's mask proposals of a data set", "cores.utils.precompute.proposals"
    ),
    "cache": Command(
        "write SAM's image features of a data set", "cores.utils.precompute.sam_cache"
    ),
    "curve": Command("draw the curves of runs", "cores.utils.training.curve"),
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
        raise ValueError(f"there is no command {command.shown(name)!r}; {', '.join(COMMANDS)}")
    entry = COMMANDS[name]
    return import_module(entry.module).main([*entry.given, *rest])


if __name__ == "__main__":
    sys.exit(main())

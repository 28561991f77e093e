"""Ask a model about pictures: it answers in words and with masks.

    # a conversation; /help lists what can be typed
    python chat.py --version runs/demo/model

    # one answer
    python chat.py --version runs/demo/model --image dog.jpg --prompt "Where is its nose?" --json

The model sees the picture and the conversation so far. Each mask of each level is saved as a PNG (0
or 255, size of the picture) beside an overlay of the final ones; the paths are printed. Exit codes
with --prompt: 0 an answer with a mask, 1 an answer without one, 2 a mistake in flags or files, 130
Ctrl-C. docs/chat.md has more.
"""

from __future__ import annotations

import glob
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cores.dataset import command
from cores.utils.settings.programs import read_chat

if __name__ == "__main__":
    command.guard(read_chat)

import torch
from transformers.utils import logging as transformers_logging

from cores.dataset.command import one_line, shown
from cores.dataset.files.write import write_text
from cores.model.inference.inputs import load_image
from cores.model.inference.results import Result
from cores.model.inference.segmenter import ReasoningSegmenter, Session
from cores.utils.asking import LESS_MEMORY, load_segmenter
from cores.utils.settings.flags import UsageError
from cores.utils.settings.typed_path import PICTURE, names_a_path, refuse_no_file, typed_path

# Importing readline gives input() line editing and a history, where the platform has it.
try:
    import readline
except ImportError:
    readline = None  # type: ignore[assignment]

# Reported in one line; anything else is a defect of the program and shows its trace.
MISTAKES = (ValueError, OSError, MemoryError, torch.OutOfMemoryError)
HELP = """Type a question about the picture, or the path of another picture.
  /image PATH   another picture and a new conversation
  /undo         take the last question and its answer back
  /reset        a new conversation about the same picture
  /save [FILE]  write the conversation, masks included, as JSON
  /help         this text; Tab completes commands and paths
  /quit         the end (quit, exit and Ctrl-D, too); Ctrl-C stops an answer"""


class TerminalChat:
    """A conversation at a terminal: what was typed, and what becomes of it."""

    def __init__(self, segmenter: ReasoningSegmenter, folder: Path):
        """``folder``: where masks are saved."""
        self.segmenter, self.folder = segmenter, folder
        self.session: Session | None = None
        self.answers: list[dict[str, Any]] = []
        """Of this conversation, ready for JSON."""
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self.open,
            "/undo": self.undo,
            "/reset": self.reset,
            "/save": self.save,
            "/help": lambda _: print(HELP),
        }

    @property
    def prompt(self) -> str:
        return "image> " if self.session is None else "question> "

    def run_line(self, line: str) -> bool:
        """Runs a command or answers a question; False for /quit. Raises ValueError or OSError and
        then leaves the conversation as it was."""
        line = line.lstrip("\ufeff")  # what Windows writes at the start of a text file
        command, rest = [*line.split(maxsplit=1), "", ""][:2]
        command = command.lower() if command.lower() in (*self.commands, "/quit") else command
        if command in ("/quit", "/exit") or line.strip().lower() in ("quit", "exit"):
            return False
        if command in self.commands:
            self.commands[command](rest.strip())
        elif line.strip() and (self.session is None or names_a_path(line)):
            self.open(line)  # without a picture a line can only be the path of one
        elif command.startswith("/"):
            raise ValueError(f"unknown command {shown(command)}; /help lists them")
        elif line.strip():
            print_answer(*self.ask(line, stream=True))
        return True

    def open(self, name: str) -> None:
        if not name:
            raise ValueError("/image needs the path of a picture")
        path = typed_path(name)
        refuse_no_file(path, name)
        self.session = self.segmenter.open(path)
        self.answers = []
        height, width = self.session.image.shape[:2]
        print(f"{shown(str(path))}: {width} × {height} pixels")

    def ask(self, question: str, stream: bool = False) -> tuple[Result, dict[str, Any]]:
        """The answer and its report with the files that were written; ``stream`` prints the text as
        it is generated."""
        if self.session is None:
            raise ValueError("there is no picture to ask about yet")
        answer = self.session.stream(question)
        if stream:
            try:
                for piece in answer:
                    print(shown(piece), end="", flush=True)
            finally:
                print(flush=True)
        result, files = answer.result, None
        try:
            files = result.save(self.folder)
        finally:  # An answer whose files cannot be written stays in the conversation.
            self.answers.append(result.to_dict(files))
        return result, self.answers[-1]

    def undo(self, _: str) -> None:
        question = self.session.undo() if self.session else None
        if question is None:
            print("there is nothing to take back")
            return
        # The session remembers no answer without text, so such answers may come after the last one
        # it remembers.
        while self.answers and self.answers.pop()["question"] != question:
            pass
        print(f"taken back: {shown(question)}")

    def reset(self, _: str) -> None:
        if self.session:
            self.session.reset()
        self.answers = []
        print("a new conversation")

    def save(self, name: str) -> None:
        if not self.answers:
            raise ValueError("there is no answer to save yet")
        path = typed_path(name) if name else self.folder / "conversation.json"
        # A mistyped path must not overwrite a photograph.
        if path.exists() and path.suffix.lower() != ".json":
            raise ValueError(
                f"{shown(str(path))}: there is another file of this name; give one that ends in"
                " .json"
            )
        write_text(path, json.dumps(self.answers, indent=1) + "\n")
        number = "1 answer" if len(self.answers) == 1 else f"{len(self.answers)} answers"
        print(f"{number} saved in {shown(str(path))}")


def _prepare_folder(folder: Path) -> None:
    """Makes the folder for masks. Raises UsageError where they cannot be saved, which is better
    found out before the model is loaded and answers."""
    reason = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            reason = "it is not writable"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    if reason is not None:
        raise UsageError(
            f"--vis_save_path {folder}: masks cannot be saved there ({reason}); give another folder"
        )


def remarks(result: Result) -> list[str]:
    """What people need to know about an answer besides its text, one short sentence each."""
    found = []
    if count := result.forgotten_turns:
        which = "question was" if count == 1 else f"{count} questions were"
        found.append(f"the oldest {which} forgotten to make room")
    if not result.text:
        found.append("no words; this question is not remembered")
    if not result.finished:
        found.append("cut at --max_new_tokens")
    return found


def print_answer(result: Result, report: dict[str, Any]) -> None:
    """Prints everything but the text; ``report``: what ``TerminalChat.ask`` returned."""
    for remark in remarks(result):
        print(f"  ({remark})")
    if reason := result.why_no_mask:
        print(f"  no mask: {reason}")
    for found, row in zip(result.masks, report["masks"], strict=True):
        for level, file in row["files"].items():
            area, iou = int(found.levels[level].sum()), found.ious[level]
            size = f"{area} pixels" if area else "empty: 0 pixels"
            print(f"  [{level}] {file} ({size}, predicted IoU {iou:.2f})")
    if report["overlay"]:
        print(f"  overlay {report['overlay']}")


def completions(line: str, commands: Iterable[str]) -> list[str]:
    """What a line of a conversation may go on as: ``commands``, and the paths of pictures and
    folders, where it begins as one of them."""
    name, space, rest = line.partition(" ")
    found = [] if space else [f"{one} " for one in sorted(commands) if one.startswith(line)]
    takes_path = space and name in ("/image", "/save")
    # A question has words; a path of several words is completed after /image.
    if takes_path or (line and not space and not found):
        typed, before = (rest, f"{name} ") if takes_path else (line, "")
        for path in sorted(glob.glob(glob.escape(os.path.expanduser(typed)) + "*")):
            if os.path.isdir(path):
                found.append(f"{before}{path}/")
            elif PICTURE.search(path) or name == "/save":
                found.append(before + path)
    return found


def complete_lines(commands: Iterable[str]) -> None:
    """Tab completes what is typed, where there is readline."""
    if readline is None:
        return
    names = [*commands, "/quit"]

    def complete(text: str, state: int) -> str | None:
        return dict(enumerate(completions(text, names))).get(state)

    readline.set_completer_delims("")  # The whole line is one word, as paths may hold anything.
    readline.set_completer(complete)
    # macOS has libedit under this name, which spells it in another way.
    bind = "bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete"
    readline.parse_and_bind(bind)


class _CtrlC:
    """The handler of SIGINT: raises KeyboardInterrupt once while ``armed`` and otherwise ignores
    the signal, so that a second Ctrl-C cannot interrupt the handling of the first."""

    armed = False

    def __call__(self, *_: Any) -> None:
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt


def converse(chat: TerminalChat, first_image: Path | None) -> None:
    """Reads lines until /quit or the end of the input. No mistake and no Ctrl-C ends it or loses
    the conversation."""
    print(HELP)
    complete_lines(chat.commands)
    line = None if first_image is None else f"/image {first_image}"
    ctrl_c, going = _CtrlC(), True
    before = signal.signal(signal.SIGINT, ctrl_c)
    try:
        while going:
            try:
                ctrl_c.armed = True
                given, line = line, None
                going = _step(chat, given)
                ctrl_c.armed = False
            except KeyboardInterrupt:
                print("\nstopped; the conversation is as it was (/quit or Ctrl-D ends it)")
    finally:
        signal.signal(signal.SIGINT, before)


def _step(chat: TerminalChat, line: str | None) -> bool:
    """Runs one line, which is asked for if there is none; False for the end."""
    try:
        return chat.run_line(input(chat.prompt) if line is None else line)
    except EOFError:
        print()
        return False
    except MISTAKES as error:
        print(f"error: {one_line(error)}")
        return True


@command.entry(ends_with_reader=True, memory=LESS_MEMORY)
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; see the top of this file."""
    args = read_chat(argv)
    if args.prompt is not None:  # A mistake is reported before the model is loaded.
        _prepare_folder(args.vis_save_path)
        refuse_no_file(args.image)
        load_image(args.image)
    transformers_logging.disable_progress_bar()
    chat = TerminalChat(load_segmenter(args), args.vis_save_path)
    if args.prompt is None:
        converse(chat, args.image)
        return 0
    chat.session = chat.segmenter.open(args.image)
    result, report = chat.ask(args.prompt, stream=not args.json)
    if args.json:
        print(json.dumps(report))
    else:
        print_answer(result, report)
    return 0 if result.masks else 1


if __name__ == "__main__":
    sys.exit(main())

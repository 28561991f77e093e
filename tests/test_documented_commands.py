"""Every command of ours in README.md and docs/*.md, as it is written there.

A page's first command comes after ``source .venv/bin/activate``, or names the environment's Python
itself. Each command is read by the real parser of its program; the files of the repository that it
names exist; a run or model that it reads is made by a command before it, on its page or in
README.md. Those that only look at what is there are run.
"""

import argparse
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from cores.__main__ import COMMANDS
from cores.utils.settings import arguments, programs
from cores.utils.settings.arguments import parse
from tests.backbone_toys import trained_run
from tests.scripted import scripted_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ACTIVATE = "source .venv/bin/activate"
MAKES = {"--exp_name": "runs/{}", "--save_path": "{}", "--out": "{}"}
READS = ("--version", "--run", "--resume")


class Command(NamedTuple):
    page: str
    words: list[str]
    """Without what starts a program: ["train_ds.py", "--config", …]."""
    own_environment: bool
    """Whether it names the environment by itself, as ``make`` and .venv/bin/python do."""

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def lines_of(page: Path) -> list[str]:
    """The lines of fenced blocks, continued ones joined, with the block's $VARIABLES in place."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    blocks = [text for language, text in fenced if language in ("", "bash", "sh", "console")]
    lines = []
    for block in blocks:
        whole = block.replace("\\\n", " ")
        for name, value in re.findall(r'^([A-Z]+)="(.*)"$', whole, re.M):
            whole = whole.replace(f"${name}", value)
        lines += [line.strip() for line in whole.splitlines()]
    return lines


def command_of(line: str, page: str) -> Command | None:
    """A line that starts a program of ours; None for any other."""
    if not re.match(r"(\S*/)?(python|deepspeed|torchrun|cores|make|pip)\s", line):
        return None
    words = shlex.split(line, comments=True)
    starter = Path(words[0]).name
    own, words = "/" in words[0] or starter == "make", words[1:]
    if starter in ("make", "pip", "cores"):
        return Command(page, [starter, *words], own)
    if starter != "python":  # A launcher has flags of its own, each with a value.
        while words[0] not in ("-m", "--module") and words[0].startswith("--"):
            words = words[2:]
    if words[0] in ("-m", "--module"):
        words = words[1:]
    redirected = [n for n, word in enumerate(words) if word in (">", "|", "&")]
    return Command(page, words[: redirected[0] if redirected else None], own)


def commands(page: Path) -> list[Command]:
    name = str(page.relative_to(ROOT))
    return [c for line in lines_of(page) if (c := command_of(line, name))]


ALL = [command for page in PAGES for command in commands(page)]


def test_the_commands_are_found():
    assert len(ALL) > 45 and len({command.page for command in ALL}) > 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_environment_comes_before_the_first_command_that_wants_it(page):
    for line in lines_of(page):
        if line.startswith(ACTIVATE):
            return
        command = command_of(line, page.name)
        assert command is None or command.own_environment or command.words[0] == "pip", (
            f"{line!r} needs `{ACTIVATE}` before it on this page"
        )


class Parsed(Exception):
    """The flags were read."""


def read(command: Command, monkeypatch) -> None:
    """Has the program's own parser read the command. Raises what that raises."""
    program, *argv = command.words
    if program.startswith("tests.") and program != "tests.parity":
        assert (ROOT / program.replace(".", "/")).with_suffix(".py").is_file()
        return None  # A helper of the tests, which is no program with flags of its own.
    if program == "cores":
        entry = COMMANDS[argv[0]]
        if entry.read:
            module, reader = entry.read.split(":")
            return getattr(importlib.import_module(module), reader)(argv[1:])
        module = entry.module.removeprefix("cores.")
        return read(Command(command.page, [module, *entry.given, *argv[1:]], True), monkeypatch)
    program = program.removesuffix(".py").replace("scripts/", "scripts.")
    readers = {
        "train_ds": programs.read_training,
        "chat": programs.read_chat,
        "app": programs.read_page,
        "merge_lora_weights_and_save_hf_model": programs.read_merge,
        "utils.evaluation": programs.read_any_evaluation,
        "utils.evaluation.cli": programs.read_any_evaluation,
        "utils.precompute_proposals": programs.read_proposals,
        "utils.sam_cache": programs.read_sam_cache,
        "utils.boxes_to_masks": programs.read_boxes,
        "utils.curve": programs.read_curve,
        "utils.predict": programs.read_predict,
        "utils.serve": programs.read_serve,
    }
    if program in readers:
        # That the run or the model is there is looked at in another test.
        monkeypatch.setattr(arguments, "read_resumed", lambda _: {"version": "of/run"})
        monkeypatch.setattr(programs, "is_folder", lambda _: True)
        readers[program](argv)
        return None
    ours = program.startswith(("dataset.", "utils."))
    module = importlib.import_module(f"cores.{program}" if ours else program)
    if not hasattr(module, "main"):
        module = importlib.import_module(f"{module.__name__}.__main__")
    real = argparse.ArgumentParser.parse_args

    def parse_args(parser, *given):
        real(parser, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    main = getattr(module.main, "__wrapped__", module.main)
    with pytest.raises(Parsed):
        main(argv)
    return None


@pytest.mark.parametrize("command", ALL, ids=str)
def test_every_command_is_read_by_its_program(command, monkeypatch):
    words = command.words
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets)
        return
    if words[0] == "pip":
        return
    if any("…" in word for word in words):
        pytest.skip("leaves flags to the reader")
    monkeypatch.chdir(ROOT)
    read(command, monkeypatch)


def made_by(command: Command) -> set[str]:
    """Folders that a command leaves."""
    words = command.words
    if words[0] == "make":
        return {"runs/demo", "runs/demo/model", "data/synthreason"}
    given = dict(zip(words, words[1:], strict=False))
    found = {place.format(given[flag]) for flag, place in MAKES.items() if flag in given}
    if words[:2] == ["utils.evaluation", "score"] and "--out" not in given:
        found.add(f"runs/{given['--name']}/eval/{programs.slug(given['--val_dataset'])}")
    if words[0] == "train_ds.py" and "--exp_name" not in given and "--config" in given:
        found.add(f"runs/{parse(['--config', given['--config']]).exp_name}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_command_reads_is_there_or_made_before(page):
    made = set().union(*(made_by(c) for c in commands(ROOT / "README.md")))
    for command in commands(page):
        words = command.words
        for word in words:
            if word.startswith(("configs/", "assets/", "scripts/", "benchmarks/")):
                assert (ROOT / word).exists(), word
        given = dict(zip(words, words[1:], strict=False))
        reads = [given[flag] for flag in READS if flag in given]
        if words[0] in ("utils.curve", "utils.evaluation"):
            reads += [word for word in words[1:] if word.startswith("runs/")]
        for place in reads:
            if place.startswith("runs/") and place not in given.get("--out", ""):
                assert any(place == one or place.startswith(f"{one}/") for one in made), (
                    f"{command}: {place} is made by no command before"
                )
        made |= made_by(command)


def looks_only(command: Command) -> bool:
    """Whether a command takes seconds and needs nothing but what `make demo` leaves: it asks one
    question, draws curves, or compares."""
    words = command.words
    if words[0] == "utils.curve" or words[:2] == ["utils.evaluation", "compare"]:
        reads = [word for word in words if word.startswith("runs/")]
        return all(word.startswith("runs/demo") for word in reads)
    return words[0] == "chat.py" and "--prompt" in words and "runs/demo/model" in words


QUICK = [command for command in ALL if looks_only(command)]


@pytest.fixture(scope="module")
def after_the_demo(tmp_path_factory) -> Path:
    """A folder as `make demo` leaves it, with a tiny run and a scripted model in place of those."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(trained_run(), folder / "runs" / "demo")
    log = folder / "runs" / "demo" / "log.jsonl"
    rows = [json.loads(line) | {"pointing": 0.1} for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(scripted_model(), folder / "runs" / "demo" / "model")
    few = ["--train", "1", "--val", "11", "--semantic", "1", "--queries", "1"]
    synthetic = importlib.import_module("cores.dataset.synthetic.write")
    synthetic.main(["--out", str(folder / "data" / "synthreason"), *few])
    return folder


@pytest.mark.parametrize("command", QUICK, ids=str)
def test_a_command_that_only_looks_runs(command, after_the_demo, monkeypatch, capsys):
    monkeypatch.chdir(after_the_demo)
    program, *argv = command.words
    module = program.removesuffix(".py").replace("utils.evaluation", "utils.evaluation.cli")
    code = importlib.import_module(f"cores.{module}").main(argv)
    assert code in (0, 1) if program == "chat.py" else code == 0, capsys.readouterr().err


def test_some_commands_are_run():
    assert {command.words[0] for command in QUICK} >= {"chat.py", "utils.curve"}

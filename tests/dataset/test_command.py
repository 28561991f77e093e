"""What ends a command: every ``main`` of the repository, found by looking, ends in the same way."""

import argparse
import ast
import errno
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

from cores.dataset import command
from cores.dataset.files.errors import DataError

ROOT = Path(__file__).parents[2]
# Programs of the tests alone.
NO_COMMANDS = {
    "tests.fork_server",
    "tests.fake_chat_server",
    "tests.generate_toys",
    "tests.faults.__main__",
}


def starts(path: Path) -> list[ast.If]:
    """The places of a source that run only where it is the program."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return [
        node
        for node in body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
    ]


def commands() -> dict[str, Path]:
    folders = ("benchmarks", "dataset", "model", "scripts", "tests", "utils")
    sources = [*ROOT.glob("*.py"), *(p for f in folders for p in (ROOT / f).rglob("*.py"))]
    found = {}
    for path in filter(starts, sources):
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = () if parts[0] in ("benchmarks", "scripts", "tests") else ("cores",)
        found[".".join(package + parts)] = path
    return {name: path for name, path in found.items() if name not in NO_COMMANDS}


COMMANDS = commands()
NAMES = sorted(COMMANDS)
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
FAULTS = [
    (MemoryError(), 5, "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 5, "on the GPU"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 5, "out of memory"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 5, "out of memory"),
    (KeyboardInterrupt(), 130, ""),
    (command.Terminated(), 130, ""),
    (RecursionError("maximum recursion depth exceeded"), 2, "nested too deeply"),
    (BrokenProcessPool("a child process terminated abruptly"), 4, "ended early"),
    (NO_SPACE, 2, "free space"),
    (DataError("a.json: is broken\nmend it\x1b[2J"), 2, "a.json: is broken mend it"),
]


def test_the_commands_are_found():
    known = {"train_ds", "chat", "app", "utils.evaluation.__main__", "utils.curve", "dataset.check"}
    known = {f"cores.{name}" for name in known}
    assert known <= COMMANDS.keys() and len(COMMANDS) > 18


def end_of(name: str, error: BaseException, monkeypatch, capsys) -> tuple[int, str]:
    """Exit code and last words of a command that meets ``error`` when it reads its flags."""

    def fail(*_, **__):
        raise error

    main = importlib.import_module(name).main
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", fail)
        capsys.readouterr()
        code = main([])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_every_command_ends_in_one_line(name, monkeypatch, capsys):
    main = importlib.import_module(name).main
    assert getattr(main, command.ENTRY, False), "decorate it with @command.entry()"
    for error, expected, words in FAULTS:
        code, text = end_of(name, error, monkeypatch, capsys)
        assert code == expected, (error, text)
        assert text.count("\n") == 1 and words in text and "\x1b" not in text, (error, text)
        assert text.startswith("error: ") == (code != 130)
    code, text = end_of(name, BrokenPipeError(errno.EPIPE, "Broken pipe"), monkeypatch, capsys)
    assert code == 4, text  # of another process: what is printed raises none


@pytest.mark.parametrize("name", NAMES)
def test_a_defect_is_not_hidden(name, monkeypatch, capsys):
    not_json = ValueError("Out of range float values are not JSON compliant: nan")
    for error in (KeyError("x"), not_json):
        code, text = end_of(name, error, monkeypatch, capsys)
        assert code == 70
        assert text.startswith("Traceback") and "please report" in text.splitlines()[-1]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_guarded_while_it_imports(name):
    """``command.guard()`` stands before anything whose import takes time."""
    source = COMMANDS[name].read_text(encoding="utf-8")
    first, *_, last = starts(COMMANDS[name])
    assert re.fullmatch(r"command\.guard\((read_\w+)?\)", ast.unparse(first.body[0]))
    assert "exit(" in ast.unparse(last) or "leave(" in ast.unparse(last), "the code is passed on"
    before = [n for n in ast.parse(source).body if n.lineno < first.lineno]
    names = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in before
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert names <= sys.stdlib_module_names | {"cores"}, names


def test_what_python_does_not_say_of_a_file_is_added():
    def read(path: Path):
        raise UnicodeDecodeError("utf-8", b"\xc1", 0, 1, "invalid start byte")

    with pytest.raises(UnicodeDecodeError) as caught:
        read(Path("some/config.json"))
    end = command.explain(caught.value)
    assert end.code == 2 and end.line.startswith("some/config.json: 'utf-8' codec")


def start(code: str, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes | options)


PROGRAM = """
import sys, time
from cores.dataset import command
command.guard()
{imports}
@command.entry(ends_with_reader={ends})
def main(argv=None):
    for number in range(2000):
        print("row", number, flush=True)
    print("done", file=sys.stderr)
    {then}
    return 0
sys.exit(main())
"""


@pytest.mark.parametrize(("ends", "code", "words"), [(False, 0, "done\n"), (True, 141, "")])
def test_nobody_reads_the_output(ends, code, words):
    process = start(PROGRAM.format(imports="", ends=ends, then=""))
    assert process.stdout.readline() == "row 0\n"
    process.stdout.close()
    assert process.stderr.read() == words
    assert process.wait(20) == code


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("buffered", ["1", ""])
def test_the_output_is_on_a_full_disk(ends, buffered):
    with open("/dev/full", "w") as full:
        environment = os.environ | {"PYTHONUNBUFFERED": buffered}
        program = PROGRAM.format(imports="", ends=ends, then="").replace(", flush=True", "")
        process = start(program, stdout=full, env=environment)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 2
    assert said.startswith("done\nerror: standard output: [Errno 28] No space left on device;")
    assert said.count("\n") == 2


def test_a_help_on_a_full_disk(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as end:
            importlib.import_module("cores.dataset.check").main(["--help"])
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: standard output")


PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_terminal_that_knows_ascii_only(tmp_path):
    (tmp_path / "狗 Â.txt").write_text("")
    look = """
import sys
from cores.dataset import command
command.guard()
from pathlib import Path
@command.entry()
def main(argv=None):
    there = Path(sys.argv[1], chr(29399) + " \xc2.txt").is_file()
    print(there, chr(29399), chr(0xdcff), input())
sys.exit(main())
"""
    environment = os.environ | PLAIN | {"PYTHONIOENCODING": "ascii"}
    (tmp_path / "look.py").write_text(look)
    done = subprocess.run(
        [sys.executable, tmp_path / "look.py", tmp_path],
        env=environment | {"PYTHONPATH": str(ROOT)},
        input="哪只狗\n".encode() + b"\xff",
        capture_output=True,
    )
    assert done.stderr == b"" and done.returncode == 0
    assert done.stdout == rb"True \u72d7 \udcff \u54ea\u53ea\u72d7" + b"\n"


def test_files_never_get_the_numbers_of_closed_streams(tmp_path):
    program = """
import os, sys
from cores.dataset import command
command.guard()
@command.entry()
def main(argv=None):
    print("lost")
    with open(sys.argv[1], "w") as file:
        os.write(1, b"of others")
        print("kept", file=file)
    return 3
sys.exit(main())
"""
    argv = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-c", program, tmp_path / "f"]
    assert subprocess.run(argv, cwd=ROOT).returncode == 3
    assert (tmp_path / "f").read_text() == "kept\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["imports", "then"])
def test_a_signal_at_any_time(number, place):
    lines = {"imports": "", "then": ""} | {place: "time.sleep(60)"}
    process = start(PROGRAM.format(ends=False, **lines))
    if place == "then":
        while process.stderr.read(1) != "d":
            pass
    else:
        time.sleep(0.5)
    process.send_signal(number)
    rest, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "stopped" and "Traceback" not in error


def test_forked_processes_end_as_ever(tmp_path):
    """SIGTERM for a data worker is no exception in it."""
    code = """
    import os, signal
    child = os.fork()
    if not child: time.sleep(60)
    time.sleep(0.2); os.kill(child, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
"""
    process = start(PROGRAM.format(imports="", ends=False, then=code.strip()))
    _, error = process.communicate(timeout=20)
    assert process.returncode == 1 and error == "done\n"


@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [2.5, 3.5, 4.5, 6])
def test_little_memory(gigabytes, tmp_path):
    """A limit of the address space, which is met while libraries load or when memory is asked."""
    limit = f"ulimit -v {int(gigabytes * 1e6)}; exec {sys.executable} train_ds.py --version x"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", limit], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode in (2, 5), done.stderr
    assert "Traceback" not in done.stderr, done.stderr

"""One place around ``main`` for every command: what ends it, in one line and with which exit code.

    if __name__ == "__main__":      # above the imports that take seconds
        command.guard(read_flags)   # so that help and mistakes do not wait for them

    @command.entry(stopped="stopped; the same command continues")
    def main(argv: list[str] | None = None) -> int: ...

A mistake in flags or files is a line and exit code 2, Ctrl-C and SIGTERM are a line and 130; an
error of a class with an ``exit_code`` has its own. A defect of the program shows its trace, and a
last line that says so. What is printed ends no work: not a terminal without the characters, not a
full disk, not a reader who has gone.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import errno
import functools
import logging
import os
import re
import signal
import sys
import threading
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from json import JSONDecodeError
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from cores.dataset.files.write import DISK_FULL, disk_error

MISTAKE, PROCESS_LOST, OUT_OF_MEMORY, DEFECT, STOPPED = 2, 4, 5, 70, 130
READER_GONE = 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1

# Unicode's overrides and embeddings of direction, which can make a name look like another one.
TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
ENTRY = "is_command_entry"  # the mark of a ``main`` that ``entry`` decorates

# Of a pipe whose reader has ended, and of a terminal that was closed.
NO_READER = {errno.EPIPE, errno.EIO}
# What torch, CUDA, OpenCV, the C++ library and the loader of libraries say without memory.
NO_MEMORY = re.compile(
    r"out of memory|(can't|cannot|could not|failed to) allocate|not enough memory|bad_alloc"
    r"|insufficient memory|unable to mmap|failed to map segment|ALLOC_FAILED|start new thread",
    re.IGNORECASE,
)

# Packages that only some commands need -> the extra of pyproject.toml that brings them.
EXTRAS = {
    "train": ("deepspeed", "tensorboard", "bitsandbytes"),
    "app": ("gradio",),
    "serve": ("fastapi", "uvicorn"),
    "data": ("pyarrow", "datasets"),
    "track": ("wandb", "mlflow", "trackio"),
    "flash": ("flash_attn",),
}

# Errors of Python's own readers, which know of no file.
NAMELESS = (UnicodeDecodeError, JSONDecodeError)


class Terminated(BaseException):
    """SIGTERM came; not an Exception, as nothing but ``entry`` shall catch it."""


class MemoryRanOut(RuntimeError):
    """Out of memory, with words on what was being done and what needs less."""

    exit_code = OUT_OF_MEMORY


class Advice(NamedTuple):
    """What a command says about going on."""

    stopped: str = "stopped"
    """After Ctrl-C and SIGTERM."""
    memory: str = "end other programs, or use a machine with more"
    """What needs less memory."""


_advice = Advice()


class Parser(argparse.ArgumentParser):
    """Flags of a program. A mistake is one line instead of a page of usage, and flags are written
    out. ``program``: how it is started, where that is not a script's name."""

    mistake: type[ValueError] = ValueError
    """What a mistake raises."""

    def __init__(self, about: str | None = None, program: str | None = None, **how: Any):
        how = {"prog": program and started_as(program), "description": about} | how
        super().__init__(allow_abbrev=False, **how)

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--\w+): is ", r"\1 is ", message)
        if message.startswith("unrecognized arguments:") and message.endswith((": ", "  ")):
            message = "an argument is empty or blank, as after a backslash that ends no line"
        raise self.mistake(f"{message}; --help lists the flags")


class End(NamedTuple):
    """How a command ends."""

    code: int
    line: str
    """Without "error: "."""
    defect: bool = False


def shown(text: str) -> str:
    """``text`` as a terminal may show it, without control characters, which could steer it, and
    without marks that turn the direction of what follows."""
    return "".join(
        " " if unicodedata.category(c) in ("Cc", "Cs") or c in TURNING else c for c in text
    )


class _ShownRecords(logging.Formatter):
    """What is logged names files and texts of others."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def one_line(error: BaseException) -> str:
    """The message of an error, or its class name if it has none, as one printable line."""
    text = str(error).strip()
    # torch puts the whole trace of a data worker into the message, whose last line is like
    # "dataset.files.errors.DataError: /data/a.jpg: not a readable image".
    if "Original Traceback" in text:
        text = text.splitlines()[-1].split(": ", 1)[-1]
    return " ".join(shown(text).split()) or type(error).__name__


def out_of_memory(error: BaseException) -> str:
    """What lacks, in words, if ``error`` says that memory ran out; else ""."""
    # torch is not imported here: the commands that read data only shall start without it.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    if not (
        kinds & {"MemoryError", "OutOfMemoryError"}
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (kinds & {"RuntimeError", "ImportError", "error"} and NO_MEMORY.search(text))
    ):
        return ""
    gpu = "OutOfMemoryError" in kinds or re.search("CUDA|CUBLAS|CUDNN|HIP", text)
    asked = re.search(r"(?:tried|unable) to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    more = f" ({asked[1]} more were asked for)" if asked else ""
    return f"out of memory{' on the GPU' if gpu else ''}{more}"


def explain(error: BaseException) -> End:
    """Exit code and line of what ended the command that runs now."""
    line = one_line(error)
    if isinstance(error, (KeyboardInterrupt, Terminated)):
        return End(STOPPED, _advice.stopped)
    if isinstance(code := getattr(error, "exit_code", None), int):
        return End(code, line)
    if lack := out_of_memory(error):
        return End(OUT_OF_MEMORY, f"{lack}; {_advice.memory}")
    if isinstance(error, RecursionError):
        return End(MISTAKE, f"{_at_hand(error)}is nested too deeply to be read")
    if _is_lost_process(error):
        return End(
            PROCESS_LOST,
            f"another process ended early ({line}); the system ends the largest one when memory"
            " runs out, so start fewer of them (--workers, --jobs), and the same command continues",
        )
    if (full := disk_error(error)) and full.errno in DISK_FULL:
        file = "" if full.filename else _at_hand(error)
        line = line if full is error else one_line(full)
        way_on = "" if "free space" in line else "; free space, and the same command continues"
        return End(MISTAKE, f"{file}{line}{way_on}")
    if isinstance(error, ModuleNotFoundError) and (extra := extra_with(error.name or "")):
        return End(MISTAKE, f"the package {error.name} is not installed; {extra}")
    # Numbers that JSON cannot hold are computed here, so that no file of the user's is to blame.
    if isinstance(error, (ValueError, OSError)) and "not JSON compliant" not in line:
        file = _at_hand(error) if isinstance(error, NAMELESS) else ""
        return End(MISTAKE, file + line)
    return End(
        DEFECT,
        f"{type(error).__name__}: {line}; this is a defect of the program, no mistake of yours:"
        " please report the lines above together with the command",
        defect=True,
    )


def extra_with(package: str) -> str:
    """How to install an optional package, "" for one that is none."""
    name = package.partition(".")[0]
    found = next((extra for extra, names in EXTRAS.items() if name in names), "")
    return f'pip install "cores[{found}]", or in a clone pip install -e ".[{found}]"' * bool(found)


def _is_lost_process(error: BaseException) -> bool:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    worker = "DataLoader worker" in text and "Traceback" not in text
    return worker or "BrokenExecutor" in kinds or isinstance(error, ConnectionError)


def _at_hand(error: BaseException) -> str:
    """The file that the innermost function with a path among its arguments was given, as the
    beginning of a line; else ""."""
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        for value in (frame.f_locals.get(name) for name in names):
            if isinstance(value, Path) or (isinstance(value, str) and _is_file(value)):
                found = f"{shown(str(value))}: "
    return found


def _is_file(text: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return len(text) < 4096 and os.path.isfile(text)
    return False


def report(end: End, error: BaseException) -> int:
    """Prints how the command ends; the exit code. A second Ctrl-C does not get between."""
    with _signals_ignored(), contextlib.suppress(OSError):
        if end.defect:
            traceback.print_exception(error)
        prefix = "" if end.code == STOPPED else "error: "
        print(f"{prefix}{end.line}", file=sys.stderr, flush=True)
    return end.code


def entry(*, ends_with_reader: bool = False, **advice: str) -> Callable:
    """Decorates ``main(argv) -> exit code``; ``advice``: the fields of ``Advice``.

    ``ends_with_reader``: the command ends when nobody reads its output any more; others do their
    work to the end, in silence. All do where the output cannot be written, as to a full disk; the
    exit code is then 2.
    """

    def decorate(main: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(main)
        def guarded(argv: list[str] | None = None) -> Any:
            global _advice
            before, _advice = _advice, Advice(**advice)
            try:
                with _sigterm_raises(), _printing(ends_with_reader) as printed:
                    try:
                        code = _run(main, argv)
                    except SystemExit as end:  # of --help
                        raise SystemExit(printed.end(end.code)) from None
                    return printed.end(code)
            finally:
                _advice = before

        setattr(guarded, ENTRY, True)
        return guarded

    return decorate


def _run(main: Callable[..., Any], argv: list[str] | None) -> Any:
    try:
        return main(argv)
    except SystemExit:
        raise
    except _ReaderGone:
        return READER_GONE
    except BaseException as error:
        end = explain(error)
        return end.code if getattr(error, "said", False) else report(end, error)


def arguments(argv: Sequence[str] | None) -> Sequence[str]:
    """``argv``, or those of this process."""
    return sys.argv[1:] if argv is None else argv


def started_as(program: str) -> str:
    """How this process was started: as "cores NAME", or as ``program``."""
    return sys.argv[0] if sys.argv[0].startswith("cores ") else program


def refuse_flags(read: Callable[[], object]) -> None:
    """Ends the program where ``read`` finds a mistake in its flags or prints its help. Who sits at
    a terminal is told what the seconds that follow are for."""

    def main(_: list[str] | None = None) -> int:
        found = read()
        flags = found[0] if isinstance(found, tuple) else found
        models = (getattr(flags, name, None) for name in ("version", "model", "run", "weight"))
        if (model := next(filter(None, models), None)) and sys.stderr.isatty():
            print(shown(f"reading {model} …"), file=sys.stderr, flush=True)
        return 0

    if code := entry(ends_with_reader=True)(main)():
        sys.exit(code)


_leave: Callable[[int], NoReturn] = sys.exit


def leave_by(end: Callable[[int], NoReturn]) -> None:
    """From now on ``leave`` calls ``end``: a process among ranks ends in another way."""
    global _leave
    _leave = end


def leave(code: int) -> NoReturn:
    """Ends the program."""
    _leave(code)


def guard(read: Callable[[], object] | None = None) -> None:
    """For a program while it imports: what ends it is one line, too. ``read``: reads its flags, as
    ``main`` will again, so that what is wrong with them is told before the imports."""
    if sys.getfilesystemencoding() == "ascii":
        # As LANG=C with PYTHONUTF8=0 has it, which could name no file with other characters.
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])

    def end_now(_: type, error: BaseException, __: Any) -> NoReturn:
        code = report(explain(error), error)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)

    if os.environ.get("WORLD_SIZE", "1") != "1":
        # When a rank ends, torch's C++ parts would warn all others with the names of their frames.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    sys.excepthook = end_now
    for number in range(3):  # Else the first file that is opened would get what others print.
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    signal.signal(signal.SIGTERM, _terminate)
    if read is not None:
        refuse_flags(read)


def _terminate(number: int, _: FrameType | None) -> None:
    raise Terminated


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM raises Terminated, so that files and folders are left in order. Processes that this
    one forks end as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process, previous = os.getpid(), signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _terminate(number, frame)

    if previous is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    both = signal.SIGINT, signal.SIGTERM
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in both}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


class _ReaderGone(BaseException):
    """Nobody reads the output of a command that ends then."""


class _Printed:
    """Passes everything on to ``stream``, with escapes for the characters that it lacks, until it
    cannot be written."""

    def __init__(self, stream: Any, ends_with_reader: bool = False):
        self._stream, self._ends = stream, ends_with_reader
        self._lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._do(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _do(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            first, self._lost = self._lost is None, self._lost or error
            _silence(self._stream)
            if self._ends and first and error.errno in NO_READER:
                raise _ReaderGone from None

    def end(self, code: Any) -> Any:
        """The exit code of a command that would end with ``code``: not 0 if what it printed is
        lost to anything but a reader's choice."""
        try:
            self.flush()
        except _ReaderGone:
            return code or READER_GONE
        if code or self._lost is None or self._lost.errno in NO_READER:
            return code
        line = f"standard output: {one_line(self._lost)}; the work is done, but not all was printed"
        return report(End(MISTAKE, line), self._lost)


def _silence(stream: Any) -> None:
    """Whatever comes after goes nowhere, what is still in the buffer included."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def _printing(ends_with_reader: bool) -> Iterator[_Printed]:
    """Both streams as ``_Printed``; yields that of the standard output. What comes in may have any
    characters, too."""
    streams: tuple[Any, Any] = (sys.stdout, sys.stderr)
    # A program without a terminal may have no streams.
    whole = [stream or open(os.devnull, "w") for stream in streams]  # noqa: SIM115
    for stream in whole:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:  # the handler of programs that set up none
        logging.lastResort.setFormatter(_ShownRecords())
    stdin: Any = sys.stdin
    with contextlib.suppress(OSError, ValueError, AttributeError):
        ascii_only = codecs.lookup(stdin.encoding or "utf-8").name == "ascii"
        stdin.reconfigure(encoding="utf-8" if ascii_only else None, errors="replace")
    stdout, stderr = _Printed(whole[0], ends_with_reader), _Printed(whole[1])
    sys.stdout, sys.stderr = stdout, stderr
    try:
        yield stdout
    finally:
        stderr.flush()
        sys.stdout, sys.stderr = streams

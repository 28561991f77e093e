"""What ends a command: memory, signals, readers of its output, files that are too deep."""

import argparse
import contextlib
import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

import merge_lora_weights_and_save_hf_model as merge
import train_ds
from dataset import check, command
from tests.dataset_toys import write_reason_seg
from tests.faults.case import case
from utils.evaluation import cli as evaluation
from utils.training import curve


def last_words(main: Callable, argv: list[str], error: BaseException | None = None):
    """(exit code, what it says on stderr) of a command, which meets ``error`` at its start."""
    said = io.StringIO()

    def fail(*_: object, **__: object) -> None:
        raise error

    parser = mock.patch.object(argparse.ArgumentParser, "parse_known_args", fail)
    with contextlib.redirect_stderr(said), parser if error else contextlib.nullcontext():
        code = main([str(part) for part in argv])
    return code, said.getvalue()


@case(
    "memory runs out, on the GPU or on the host, in any command",
    "refused",
    "one line with what was asked for and the flags that need less, exit code 5",
)
def out_of_memory(tmp_path: Path) -> None:
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")
    host = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …")
    for error in (gpu, host, MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")):
        code, line = last_words(train_ds.main, [], error)
        assert code == 5 and line.count("\n") == 1 and "out of memory" in line, line
        assert "--batch_size" in line and "--load_in_4bit" in line and "--offload" in line
    assert "on the GPU (2.00 GiB more" in last_words(merge.main, [], gpu)[1]


@case(
    "Ctrl-C or SIGTERM outside the training loop: while a model loads, data are checked, a report"
    " is written",
    "refused",
    "one line and exit code 130, in every command",
)
def stopped_anywhere(tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        for main in (train_ds.main, merge.main, evaluation.main, curve.main, check.main):

            def parse(*_: object, number: int = number, **__: object) -> None:
                os.kill(os.getpid(), number)

            before = signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                with mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse):
                    code, line = last_words(main, [])
            finally:
                signal.signal(signal.SIGINT, before)
            assert code == 130 and line.startswith("stopped") and line.count("\n") == 1


@case(
    "`| head -1`, or a terminal that was closed, behind a command that works for hours",
    "right",
    "the work goes on in silence and ends with its own exit code",
)
def nobody_reads(tmp_path: Path) -> None:
    write_reason_seg(tmp_path, count=2)
    reading, writing = os.pipe()
    os.close(reading)
    argv = ["--dataset_dir", str(tmp_path), "--fix-list", str(tmp_path / "bad.jsonl")]
    with os.fdopen(writing, "w") as pipe, contextlib.redirect_stdout(pipe):
        code, line = last_words(check.main, argv)
    assert code in (0, 1) and "rror" not in line
    assert (tmp_path / "bad.jsonl").is_file(), "what comes after the first print is done"


@case(
    "a JSON or a configuration that is nested 100,000 deep, or in no encoding",
    "refused",
    "one line that names the file",
)
def nested_too_deeply(tmp_path: Path) -> None:
    deep = tmp_path / "deep.yaml"
    deep.write_text("version: " + "[" * 100_000)
    code, line = last_words(train_ds.main, ["--config", deep])
    assert code == 2 and line.count("\n") == 1 and "deep.yaml" in line, line
    deep.write_bytes(b"version: \x81\x9d\n")
    code, line = last_words(train_ds.main, ["--config", deep])
    assert code == 2 and line.count("\n") == 1 and "deep.yaml" in line, line


@case(
    "a defect of the program",
    "refused",
    "its trace, a last line that says that it is one, exit code 70",
)
def a_defect(tmp_path: Path) -> None:
    code, text = last_words(merge.main, [], KeyError("version"))
    assert code == command.DEFECT and text.startswith("Traceback")
    assert "please report" in text.splitlines()[-1]

"""What ends a command: memory, signals, readers of its output, files that are too deep."""

import argparse
import contextlib
import errno
import io
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from cores import merge_lora_weights_and_save_hf_model as merge
from cores import train_ds
from cores.dataset import check, command
from cores.dataset.files.errors import DataError
from cores.dataset.files.faults import read_skip_list
from cores.dataset.synthetic import write as synthetic
from cores.utils.evaluation import cli as evaluation
from cores.utils.training import curve
from tests.dataset_toys import write_reason_seg
from tests.faults.case import case


@contextlib.contextmanager
def full_disk(room: int = 64):
    """No file of this process may grow beyond ``room`` bytes, which fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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


@case(
    "the disk of the outputs is full: sheets and list of the check, comparison, curve, benchmark",
    "refused",
    "one line that names the file and what to do, exit code 2; nothing half-written is left",
)
def disk_of_outputs_is_full(tmp_path: Path) -> None:
    folder = write_reason_seg(tmp_path / "data")
    (folder / "000.json").write_text("[]")
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    out = tmp_path / "out"
    data = ["--dataset_dir", str(tmp_path / "data"), "--all"]
    argvs = {
        check.main: [[*data, "--out", out / "sheets"], [*data, "--fix-list", out / "bad.jsonl"]],
        curve.main: [[tmp_path / "log.jsonl", "--out", out / "curve.png"]],
        synthetic.main: [["--out", out / "bench", "--train", 1, "--val", 1, "--semantic", 1]],
    }
    for main, several in argvs.items():
        for argv in several:
            with full_disk(), contextlib.redirect_stdout(io.StringIO()):
                code, line = last_words(main, argv)
            assert code == 2 and line.count("error:") == 1 and "free space" in line, line
            assert str(argv[argv.index("--out" if "--out" in argv else "--fix-list") + 1]) in line
    assert not [path for path in out.rglob("*") if path.is_file()]


@case(
    "an output is named that is an input: --fix-list on annotations, --out of a curve on its log",
    "refused",
    "one line; the file stays what it was",
)
def output_is_an_input(tmp_path: Path) -> None:
    file = write_reason_seg(tmp_path) / "000.json"
    log = tmp_path / "log.jsonl"
    log.write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    before = file.read_bytes(), log.read_bytes()
    for main, argv in (
        (check.main, ["--dataset_dir", tmp_path, "--fix-list", file]),
        (curve.main, [log, "--out", log]),
        (evaluation.main, ["compare", file, file, "--html", file]),
    ):
        code, line = last_words(main, argv)
        assert code == 2 and line.count("\n") == 1 and str(argv[-1]) in line, line
    assert (file.read_bytes(), log.read_bytes()) == before


@case(
    "a named pipe where a photo, its JSON or a skip list is expected",
    "refused",
    "one line; nothing is waited for",
)
def pipes_for_files(tmp_path: Path) -> None:
    folder = write_reason_seg(tmp_path)
    for name in ("000.jpg", "001.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert last_words(check.main, ["--dataset_dir", tmp_path, "--all"])[0] == 1
    assert "000.jpg is not in" in said.getvalue() and "001.json: is a pipe" in said.getvalue()
    with pytest.raises(DataError, match="is a pipe"):
        read_skip_list(folder / "001.json")
    handed, end = os.pipe()
    os.write(end, b'{"dataset": "a|train", "item": "x"}')
    os.close(end)  # as a shell hands over <(grep …)
    assert len(read_skip_list(f"/dev/fd/{handed}")) == 1
    os.close(handed)


@case(
    "the standard output goes to a full disk",
    "refused",
    "the work goes on and is kept; one line and exit code 2 say that not all was printed",
)
def output_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full):
        code, line = last_words(curve.main, [tmp_path / "log.jsonl"])
    assert code == 2 and line.startswith("error: standard output: ") and line.count("\n") == 1
    assert (tmp_path / "curve.png").stat().st_size > 1000


@case(
    "a terminal that knows ASCII only (LANG=C, a batch system), names and queries of other scripts",
    "right",
    "every command prints, with escapes for what the terminal lacks",
)
def terminal_of_ascii(tmp_path: Path) -> None:
    folder = write_reason_seg(tmp_path / "圖", name="試")
    (folder / "000.json").rename(folder / "狗.json")
    (folder / "000.jpg").rename(folder / "狗.jpg")
    (folder / "001.json").write_text(json.dumps({"text": 3}))
    said = io.BytesIO()
    terminal = io.TextIOWrapper(said, "ascii", "strict")
    with contextlib.redirect_stdout(terminal):
        code, line = last_words(check.main, ["--dataset_dir", tmp_path / "圖", "--all"])
    text = said.getvalue().decode("ascii")
    assert code == 1 and not line and "001.json" in text and r"\u8a66" in text, (line, text)

"""Run folders."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from cores import merge_lora_weights_and_save_hf_model as merging
from cores import train_ds
from cores.dataset.files.sealed import read_sealed, write_sealed
from cores.utils.evaluation import cli
from cores.utils.training import lock, shards
from cores.utils.training.checkpoint import FILES, PROGRESS
from cores.utils.training.log import RunLog, read_log
from tests.backbone_toys import flags, toys, trained_run, write_all
from tests.faults.case import case

MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def run_in(tmp_path: Path) -> Path:
    return shutil.copytree(trained_run(), tmp_path / "run")


def train(run: Path, *more: object, **changes: object) -> tuple[int, str]:
    argv = flags(toys(), log_base_dir=run.parent, exp_name=run.name, **changes)
    return call(train_ds.main, [*argv, *more])


def merge(out: Path, *argv: object) -> tuple[int, str]:
    return call(merging.main, ["--save_path", out, *argv])


def evaluate(run: Path, out: Path) -> tuple[int, str]:
    return call(cli.main, [run, "--out", out, "--eval_mode", "teacher_forced"])


def call(main: Callable[[list[str]], int], argv: list[Any]) -> tuple[int, str]:
    """Exit code, and what was said on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(part) for part in argv])
    return code, said.getvalue()


def assert_refused(found: tuple[int, str], *words: object) -> None:
    code, said = found
    assert code == 2, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in said, said
    assert all(str(word) in lines[0] for word in words), lines[0]


def described() -> list[object]:
    """Flags that describe the model to a merge without a run folder."""
    words = ("version", "vision_pretrained", "conv_type", "refiner", "exemplar_count", "precision")
    argv = flags(toys())
    chosen = [[f"--{name}", argv[argv.index(f"--{name}") + 1]] for name in words]
    return [part for pair in chosen for part in pair]


# ------------------------------------------------------------------------------ code in checkpoints


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def poison(checkpoint: Path, name: str, marker: Path) -> None:
    file = checkpoint / "state" / name
    content = shards.read_states(file, mmap=False) if name.endswith("_states.pt") else {}
    torch.save(content | {"more": Evil(marker)}, file)
    (checkpoint / FILES).unlink(missing_ok=True)  # As somebody would who means it.


@case(
    "DeepSpeed checkpoints of others whose pickles hold a call (os.mkdir), in the model's or the"
    " optimizer's file: merge --weight FOLDER, --weight FOLDER/state and --run, auto-resume,"
    " --resume, --eval_only --resume, python -m utils.evaluation",
    "refused",
    "one line names the file and the call; nothing is executed",
)
def code_in_a_checkpoint(tmp_path: Path) -> None:
    for name in (MODEL, OPTIMIZER):
        run, marker = run_in(tmp_path / name), tmp_path / "ran"
        for which in ("last", "best"):
            poison(run / "ckpt" / which, name, marker)
        best = run / "ckpt" / "best"
        ways = [
            merge(tmp_path / "m", "--weight", best),
            merge(tmp_path / "m", "--weight", best / "state", *described()),
            merge(tmp_path / "m", "--run", run),
            train(run),
            train(run, "--resume", best),
            call(train_ds.main, ["--eval_only", "--resume", run]),
            evaluate(run, tmp_path / "out"),
        ]
        for found in ways:
            assert_refused(found, name, "posix.mkdir", "may run code")
        assert not marker.exists() and not (tmp_path / "m").exists()


@case(
    "a checkpoint of another program with a call in the file of the random state, and a `latest`"
    " that is a path, bytes or 10 MB",
    "refused",
    "the file is named and not executed; `latest` never leaves the folder",
)
def code_in_other_files(tmp_path: Path) -> None:
    run, marker = run_in(tmp_path), tmp_path / "ran"
    torch.save({"torch": Evil(marker)}, run / "ckpt" / "last" / "random_0.pt")
    (run / "ckpt" / "last" / FILES).unlink()
    assert_refused(train(run), "random_0.pt", "posix.mkdir")
    folder = tmp_path / "theirs"
    folder.mkdir()
    for latest in (
        str(run / "ckpt" / "best" / "state"),
        "../run/ckpt/best/state",
        "a\0b",
        "x" * 10**7,
    ):
        (folder / "latest").write_text(latest)
        assert_refused(merge(tmp_path / "m", "--weight", folder, *described()), folder)
    (folder / "latest").write_bytes(b"\xff\xfe")
    assert_refused(merge(tmp_path / "m", "--weight", folder, *described()), folder)
    assert not marker.exists()


# ------------------------------------------------------------------------------ damaged checkpoints


@case(
    "one bit flipped, or the end cut off, in a file of ckpt/best: merge, evaluation, resume",
    "refused",
    "one line names the file and what is wrong with it, before a model is loaded",
)
def damaged_best(tmp_path: Path) -> None:
    for number, name in enumerate([MODEL, OPTIMIZER, "../progress.json", "../files.json"]):
        run = run_in(tmp_path / str(number))
        file = (run / "ckpt" / "best" / "state" / name).resolve()
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1 << number
        file.write_bytes(content)
        for one in (merge(tmp_path / "m", "--run", run), evaluate(run, tmp_path / "out")):
            assert_refused(one, file, "damaged")
        assert_refused(train(run), file.name, "remove")
    run = run_in(tmp_path / "cut")
    file = run / "ckpt" / "best" / "state" / OPTIMIZER
    os.truncate(file, file.stat().st_size - 100)
    for one in (merge(tmp_path / "m", "--run", run), evaluate(run, tmp_path / "out"), train(run)):
        assert_refused(one, file, "cut off")
    assert not (tmp_path / "m").exists()


@case(
    "progress.json that says epoch 99, lacks a field, or was edited; files.json that is {}",
    "refused",
    "one line names the file; the checkpoint that is whole is offered",
)
def doubtful_progress(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    last = run / "ckpt" / "last"
    healthy = read_sealed(last / PROGRESS)
    write_sealed(last / PROGRESS, healthy | {"epoch": 99})
    assert_refused(train(run), "progress.json", "epoch 99", "--no-auto_resume")
    for odd in ({"epoch": 1}, {}, healthy | {"step": "1"}, healthy | {"world_size": 0}):
        (last / PROGRESS).write_text(json.dumps(odd))
        assert_refused(train(run), "progress.json", "damaged", "best is whole")
    write_sealed(last / PROGRESS, healthy)
    edited = (last / PROGRESS).read_text().replace('"epoch": 2', '"epoch": 1')
    (last / PROGRESS).write_text(edited)
    assert_refused(train(run), "progress.json", "damaged")
    write_sealed(last / PROGRESS, healthy)
    for content in ("{}", "[]", "null", '{"a": "b"}', '{"../x": 1}', '{"progress.json": 1}'):
        (last / FILES).write_text(content)
        assert_refused(train(run), "files.json", "damaged")


# --------------------------------------------------------------------------- config.json, log.jsonl


@case(
    "config.json removed, cut, null, [], not UTF-8, or with a text for a number",
    "right",
    "said, and its copy in the checkpoint is used by resume, merge and evaluation",
)
def settings_lost(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    config = run / "config.json"
    whole = json.loads(config.read_text()) | {"no_eval": True, "log_base_dir": str(tmp_path)}
    lost = [b"", b"null", b"[]", b"\xff\xfe{", b'{"epochs": "2"}', b"{}", b"[" * 10**5]
    for content in (*lost, None):
        config.unlink(missing_ok=True)
        if content is not None:
            config.write_bytes(content)
        assert train(run, "--no_eval")[0] == 0
        assert json.loads(config.read_text()) == whole | {"exp_name": "run"}
    config.write_text("null")
    assert merge(tmp_path / "m", "--run", run)[0] == 0


@case(
    "config.json damaged in a run of an older version, whose checkpoints hold no copy",
    "refused",
    "one line names the file and two ways on, both of which work",
)
def settings_lost_without_copy(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    for which in ("last", "best"):
        for name in ("settings.json", "identity.json", FILES):
            (run / "ckpt" / which / name).unlink()
    (run / "config.json").write_text("null")
    state = run / "ckpt" / "best" / "state"
    for one in (train(run, "--no_eval"), merge(tmp_path / "m", "--run", run)):
        assert_refused(one, "config.json", "--accept_changes", f"--weight {state}")
    assert merge(tmp_path / "m", "--weight", state, *described())[0] == 0
    assert train(run, "--no_eval", "--accept_changes")[0] == 0


@case(
    "a digit changed in config.json (lora_alpha 16 to 17), then merge and evaluation",
    "refused",
    "the setting is named with both values and the copy that says otherwise",
)
def settings_edited(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    config = run / "config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 17'))
    for one in (merge(tmp_path / "m", "--run", run), evaluate(run, tmp_path / "out")):
        assert_refused(one, "config.json", "lora_alpha 17", "with 16")


@case(
    "log.jsonl with a damaged line, an empty line, NULs and a text for a number in the middle",
    "right",
    "these lines are left out and said, all others stay, log.jsonl.bad keeps the file",
)
def damaged_log(tmp_path: Path) -> None:
    good = [json.dumps({"kind": "train", "step": step, "loss": 0.5}) for step in range(1, 7)]
    bad = ["\0\0\0", good[1][:-5], "", json.dumps({"kind": "train", "step": "3"}), "[" * 10**5]
    lines = [good[0], *bad, *good[1:], good[0][:9]]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    before = (tmp_path / "log.jsonl").read_text()
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    log = RunLog(tmp_path, {"train": 5, "val": 0})
    log.write({"step": 6}, "train")
    log.close()
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "log.jsonl.bad").read_text() == before


# -------------------------------------------------------------------------- two at a time, identity


@case(
    "a second training in a run folder that one is at work in",
    "refused",
    "one line names the process that has it; nothing in the folder changes",
)
def two_runs(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    with lock.owned(run):
        before[run / lock.NAME] = (run / lock.NAME).stat().st_mtime_ns
        assert_refused(train(run), run, f"process {os.getpid()}", "--exp_name")
        assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    with lock.owned(tmp_path / "new" / "name"):
        pass
    assert not (tmp_path / "new").exists()


@case(
    "merge --which last between the two renames with which a training replaces it",
    "right",
    "last.old is read; nothing is renamed",
)
def read_while_replaced(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    (run / "ckpt" / "last").rename(run / "ckpt" / "last.old")
    with lock.owned(run):
        assert merge(tmp_path / "m", "--run", run, "--which", "last")[0] == 0
    assert not (run / "ckpt" / "last").exists() and (run / "ckpt" / "last.old").is_dir()


@case(
    "LLaVA, then SAM, replaced by other weights of the same shapes: resume, merge, evaluation, and"
    " merge --version OTHER",
    "refused",
    "the flag whose weights changed is named; --accept_changes goes on",
)
def other_backbone(tmp_path: Path) -> None:
    write_all(tmp_path)
    argv = flags(tmp_path, epochs=1, no_eval="true")
    assert call(train_ds.main, argv)[0] == 0
    run, out = tmp_path / "runs" / "run", tmp_path / "m"
    for flag, file in (("version", "model.safetensors"), ("vision_pretrained", "sam.safetensors")):
        path = tmp_path / {"version": "llava", "vision_pretrained": "sam"}[flag]
        other = shutil.copytree(path, tmp_path / "other" / path.name)
        weights = {name: value * 1.1 for name, value in load_file(path / file).items()}
        save_file(weights, other / file, {"format": "pt"})
        words = f"the weights of --{flag} {other}", "--accept_changes"
        assert_refused(merge(out, "--run", run, f"--{flag}", other), *words)
        kept = path.rename(tmp_path / "kept")
        shutil.copytree(other, path)
        words = f"the weights of --{flag} {path}", "--accept_changes"
        for one in (
            call(train_ds.main, argv),
            merge(out, "--run", run),
            merge(out, "--weight", run / "ckpt" / "last"),
            evaluate(run, tmp_path / "out"),
            call(train_ds.main, ["--eval_only", "--resume", run]),
        ):
            assert_refused(one, *words)
        shutil.rmtree(path)
        kept.rename(path)
    more = ("--version", tmp_path / "other" / "llava", "--accept_changes")
    assert merge(out, "--run", run, *more)[0] == 0


@case(
    "a training image removed, replaced or added, a question reworded, then resume",
    "refused",
    "the data set is named, with both numbers of images",
)
def other_data(tmp_path: Path) -> None:
    write_all(tmp_path)
    folder = tmp_path / "data" / "reason_seg" / "Toy" / "train"
    assert call(train_ds.main, flags(tmp_path, epochs=1, no_eval="true"))[0] == 0

    def again() -> tuple[int, str]:
        return call(train_ds.main, flags(tmp_path, epochs=1, no_eval="true"))

    image, record = folder / "000.jpg", folder / "000.json"
    kept = image.read_bytes(), record.read_bytes()
    picture = np.full((24, 32, 3), 90, dtype=np.uint8)
    assert cv2.imwrite(str(image), picture)
    assert_refused(again(), "Toy|train has other content", "--accept_changes")
    image.write_bytes(kept[0])
    record.write_bytes(kept[1].replace(b"bright", b"darker"))
    assert_refused(again(), "Toy|train has other content")
    record.unlink()
    image.unlink()
    assert_refused(again(), "Toy|train had 4 images and now has 3")
    image.write_bytes(kept[0])
    record.write_bytes(kept[1])
    assert again()[0] == 0

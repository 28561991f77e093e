"""The scripts, called as a user calls them, on pictures of one bright square."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cores import merge_lora_weights_and_save_hf_model as merge
from cores import train_ds
from cores.model import CoresForReasoningSegmentation, CoresProcessor
from cores.utils.evaluation import cli as evaluation
from cores.utils.training import checkpoint
from tests.backbone_toys import flags, toys, trained_run


def scores(run: Path) -> dict:
    metrics = json.loads((run / "metrics.json").read_text())
    return {mode: metrics[mode] for mode in ("free", "teacher_forced")}


@pytest.fixture(scope="module")
def merged() -> Path:
    folder = toys() / "merged"
    if not folder.exists():
        assert merge.main(["--run", str(trained_run()), "--save_path", str(folder)]) == 0
    return folder


def test_a_run_leaves_settings_numbers_pictures_and_curves():
    run = trained_run()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["unit"] == "fraction"
    assert metrics["seconds"] > 0
    assert metrics["free"]["n"] == 3
    assert {"emission_rate", "baselines"} <= metrics.keys()
    for name in (
        "config.json",
        "examples.png",
        "log.jsonl",
        "ckpt/best/progress.json",
        "ckpt/last/progress.json",
    ):
        assert (run / name).is_file(), name
    assert list((run / "tensorboard").glob("events*"))


def test_evaluation_of_a_run_and_of_its_merged_model_agree(merged):
    assert (
        train_ds.main(["--eval_only", "--resume", str(trained_run()), "--exp_name", "evaluated"])
        == 0
    )
    assert (
        train_ds.main([*flags(toys(), version=merged, exp_name="evaluated-merged"), "--eval_only"])
        == 0
    )
    assert scores(toys() / "runs" / "evaluated") == scores(trained_run())
    assert scores(toys() / "runs" / "evaluated-merged") == scores(trained_run())


def test_merging_changes_no_mask(merged):
    from cores.dataset.collate import collate
    from cores.dataset.mixture import EvalDataset
    from cores.utils.build import build_trained

    apart, processor, _ = build_trained(trained_run())
    whole = CoresForReasoningSegmentation.from_pretrained(merged).eval()
    assert not any("lora" in name for name in whole.state_dict())
    data = EvalDataset(toys() / "data", "Toy|val", processor.levels, 0)
    batch = collate([data[0], data[1]], processor, processor.levels, processor.conversation)
    with torch.no_grad():
        for a, b in zip(apart(batch).low_res, whole(batch).low_res, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # measured: 2e-7
    assert CoresProcessor.from_pretrained(merged).template == "tiny"


def test_merging_a_file_with_the_flags_of_lisa(merged, tmp_path):
    weights = checkpoint.read_weights(trained_run() / "ckpt" / "best")
    torch.save(dict(weights), tmp_path / "pytorch_model.bin")
    argv = [
        "--weight",
        str(tmp_path / "pytorch_model.bin"),
        "--save_path",
        str(tmp_path / "out"),
        "--precision",
        "fp32",
    ]
    toy = [
        "--version",
        str(toys() / "llava"),
        "--vision_pretrained",
        str(toys() / "sam"),
        "--conv_type",
        "tiny",
    ]
    assert (
        merge.main([*argv, *toy, "--exemplar_count", "0", "--refiner", "foreground+background"])
        == 0
    )
    ours, theirs = (
        CoresForReasoningSegmentation.from_pretrained(f).state_dict()
        for f in (tmp_path / "out", merged)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_merged_model_trains_on(merged):
    changes = {"version": merged, "epochs": 1, "steps_per_epoch": 1, "no_eval": "true"}
    assert train_ds.main(flags(toys(), exp_name="further", **changes)) == 0
    out = toys() / "further"
    assert merge.main(["--run", str(toys() / "runs" / "further"), "--save_path", str(out)]) == 0
    assert CoresProcessor.from_pretrained(out).levels == ["LOC", "SEG"]


def test_merge_refuses_what_it_cannot_do(merged, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    run, new = str(trained_run()), str(tmp_path / "new")
    cases = [
        (["--run", str(merged), "--save_path", new], "is merged already"),
        (["--run", run, "--save_path", str(tmp_path / "full")], "is not empty"),
        (["--run", run, "--weight", run, "--save_path", new], "one of --run"),
        (["--save_path", new], "one of --run"),
        (["--run", run], "--save_path"),
        (["--run", run, "--save_path", new, "--lora_r", "4"], "leave the flag out"),
        (["--run", run, "--save_path", new, "--lora_alpha", "99"], "was trained with 16"),
        (["--run", str(tmp_path), "--save_path", new], "neither a run folder"),
        (["--weight", str(tmp_path / "no.bin"), "--save_path", new], "no such file"),
    ]
    for argv, words in cases:
        assert merge.main(argv) == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1
    assert not Path(new).exists()


def corrupt(root: Path, what: str) -> None:
    folder = root / "reason_seg" / "Toy" / "train"
    if what == "jpg":
        (folder / "000.jpg").write_bytes((folder / "000.jpg").read_bytes()[:200])
    elif what == "shapes":
        record = json.loads((folder / "000.json").read_text())
        record.pop("shapes")
        (folder / "000.json").write_text(json.dumps(record))
    else:
        for file in folder.iterdir():
            file.unlink()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset_dir": "/nowhere"}, ["/nowhere", "does not exist"]),
        ({"dataset": "sem_sgg"}, ["unknown data set 'sem_sgg'", "sem_seg"]),
        ({"val_dataset": "Toy|tset"}, ["tset"]),
        ({"val_dataset": "Nothing|val"}, ["Nothing"]),
        ({"vision_pretrained": "/nowhere.pth"}, ["/nowhere.pth", "--vision_pretrained"]),
        ({"version": "/nowhere"}, ["/nowhere", "--version"]),
        ({"precision": "fp16"}, ["fp16 needs a GPU"]),
        ({"exemplar_count": -1}, ["exemplar_count"]),
        ({"sample_rates": "1,2"}, ["--sample_rates"]),
        ({"broken": "jpg"}, ["000.jpg"]),
        ({"broken": "shapes"}, ["000.json", "shapes"]),
        ({"broken": "empty"}, ["train"]),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_line_before_any_work(changes, words, tmp_path, capsys):
    from tests.backbone_toys import write_data

    if changes.keys() == {"broken"}:
        corrupt(write_data(tmp_path / "data"), changes["broken"])
        changes = {"dataset_dir": tmp_path / "data"}
    if changes.get("precision") == "fp16" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    capsys.readouterr()
    assert train_ds.main(flags(toys(), log_base_dir=tmp_path / "runs", **changes)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert all(word in message for word in words), message
    assert not (tmp_path / "runs").exists()


def test_eval_only_of_a_backbone_is_refused(capsys):
    assert train_ds.main([*flags(toys()), "--eval_only"]) == 2
    assert "backbone" in capsys.readouterr().err


def test_a_run_is_measured_where_its_backbones_are_now(tmp_path, capsys):
    """As after moving them, or from another folder than the training's."""
    moved = tmp_path / "moved"
    shutil.copytree(toys() / "llava", moved)
    run = [str(trained_run()), "--eval_mode", "teacher_forced", "--out"]
    assert evaluation.main([*run, str(tmp_path / "there")]) == 0
    assert evaluation.main([*run, str(tmp_path / "here"), "--version", str(moved)]) == 0
    there, here = (
        json.loads((tmp_path / name / "targets-teacher_forced.json").read_text())["targets"]
        for name in ("there", "here")
    )
    assert there == here != []
    capsys.readouterr()
    assert evaluation.main([*run, str(tmp_path / "no"), "--version", "/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err

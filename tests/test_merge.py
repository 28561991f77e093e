"""Everything that holds trained weights is merged into the same model: checkpoints of any ZeRO
stage and number of ranks, consolidated files, shards, adapters.
"""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cores import merge_lora_weights_and_save_hf_model as merge
from cores.model import CoresForReasoningSegmentation
from cores.model.reasoning.lora import add_lora, has_lora
from cores.utils import build
from cores.utils.settings.arguments import parse_over
from cores.utils.training import checkpoint
from tests.backbone_toys import flags, toys, trained_run

ROOT = Path(__file__).resolve().parents[1]


def model_flags() -> list[str]:
    """What --weight needs to know of the toy run."""
    known = flags(toys())
    keep = ("--version", "--vision_pretrained", "--conv_type", "--refiner", "--exemplar_count")
    return [part for i, flag in enumerate(known) if flag in keep for part in known[i : i + 2]]


def merged_weights(folder: Path, *argv) -> dict[str, torch.Tensor]:
    assert merge.main([*map(str, argv), "--save_path", str(folder), "--precision", "fp32"]) == 0
    return CoresForReasoningSegmentation.from_pretrained(folder).state_dict()


def same(a: dict, b: dict, tolerance: float = 0.0) -> bool:
    return a.keys() == b.keys() and all((a[name] - b[name]).abs().max() <= tolerance for name in a)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, torch.Tensor]:
    return merged_weights(tmp_path_factory.mktemp("merged") / "run", "--run", trained_run())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The trained weights of the run, as zero_to_fp32.py would collect them."""
    return checkpoint.read_weights(trained_run() / "ckpt" / "best")


def test_a_consolidated_file(tmp_path, expected, trained):
    torch.save(trained, tmp_path / "pytorch_model.bin")
    assert same(
        merged_weights(tmp_path / "m", "--weight", tmp_path / "pytorch_model.bin", *model_flags()),
        expected,
    )


@pytest.mark.parametrize("by_index", [True, False])
def test_a_folder_of_shards(tmp_path, expected, trained, by_index):
    names = sorted(trained)
    folder = tmp_path / "fp32"
    folder.mkdir()
    index = {}
    for number, members in enumerate((names[::2], names[1::2])):
        torch.save(
            {name: trained[name] for name in members}, folder / f"pytorch_model-{number}.bin"
        )
        index |= dict.fromkeys(members, f"pytorch_model-{number}.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    source = folder / "pytorch_model.bin.index.json" if by_index else folder
    assert same(merged_weights(tmp_path / "m", "--weight", source, *model_flags()), expected)


def test_a_checkpoint_folder_as_deepspeed_leaves_it(tmp_path, expected):
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "global_step6").symlink_to(
        (trained_run() / "ckpt" / "best" / "state").resolve()
    )
    (tmp_path / "ds" / "latest").write_text("global_step6\n")
    assert same(
        merged_weights(tmp_path / "m", "--weight", tmp_path / "ds", *model_flags()), expected
    )
    assert same(
        merged_weights(
            tmp_path / "n", "--weight", tmp_path / "ds" / "global_step6", *model_flags()
        ),
        expected,
    )


def test_names_of_a_lisa_in_training_are_understood(tmp_path, expected, trained):
    from cores.model.checkpoints import published

    renamed = {}
    for name, tensor in trained.items():
        if name.startswith("segmenting.refiner"):
            renamed[name] = tensor  # LISA has none
            continue
        renamed["base_model.model." + published.their_name(name, linear_projector=False)] = tensor
    save_file(renamed, tmp_path / "lisa.safetensors")
    assert same(
        merged_weights(tmp_path / "m", "--weight", tmp_path / "lisa.safetensors", *model_flags()),
        expected,
    )


def test_an_adapter_of_peft_on_a_finished_model(tmp_path):
    finished = tmp_path / "finished"
    assert (
        merge.main(
            ["--run", str(trained_run()), "--save_path", str(finished), "--precision", "fp32"]
        )
        == 0
    )
    base = CoresForReasoningSegmentation.from_pretrained(finished).state_dict()
    settings = parse_over({}, ["--version", str(finished), "--precision", "fp32"])
    model, _ = build.build_model(settings)
    add_lora(model, r=2, alpha=6)
    torch.manual_seed(1)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    weights = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            weights["base_model.model." + name.replace(".default.", ".")] = torch.randn(
                parameter.shape
            )
    save_file(weights, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    found = merged_weights(tmp_path / "m", "--weight", adapter, "--version", finished)
    changed = {name for name in base if not torch.equal(base[name], found[name])}
    assert changed == {
        name for name in base if "language_model" in name and ("q_proj" in name or "v_proj" in name)
    }
    name = "reasoning.llava.model.language_model.layers.0.self_attn.q_proj"
    a, b = (weights[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    assert torch.allclose(found[f"{name}.weight"], base[f"{name}.weight"] + 3 * b @ a, atol=1e-6)


def test_an_adapter_needs_a_finished_model_and_its_own_rank(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]})
    )
    save_file({"x.lora_A.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    argv = ["--weight", str(tmp_path), "--save_path", str(tmp_path / "m")]
    assert merge.main([*argv, *model_flags()]) == 2
    assert "must be a finished model" in capsys.readouterr().err
    (tmp_path / "adapter_model.safetensors").unlink()
    assert merge.main([*argv, *model_flags()]) == 2
    assert "an adapter without weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_rslora", "yes"),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("peft_type", "IA3"),
        ("bias", "all"),
        ("target_modules", 3),
        ("lora_alpha", None),
    ],
)
def test_adapters_that_mean_something_else_are_refused(tmp_path, expected, field, value, capsys):
    finished = tmp_path / "finished"
    assert merge.main(["--run", str(trained_run()), "--save_path", str(finished)]) == 0
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj"],
    } | {field: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"x.lora_A.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert (
        merge.main(
            [
                "--weight",
                str(tmp_path),
                "--save_path",
                str(tmp_path / "m"),
                "--version",
                str(finished),
            ]
        )
        == 2
    )
    assert field in capsys.readouterr().err


def test_a_run_is_not_merged_into_its_own_merged_model(tmp_path, capsys):
    folder = tmp_path / "model"
    assert merge.main(["--run", str(trained_run()), "--save_path", str(folder)]) == 0
    argv = [
        "--run",
        str(trained_run()),
        "--version",
        str(folder),
        "--save_path",
        str(tmp_path / "twice"),
    ]
    assert merge.main(argv) == 2
    assert "is merged already; the run" in capsys.readouterr().err
    run = tmp_path / "further"  # one that went on from a finished model
    (run / "ckpt").mkdir(parents=True)
    settings = json.loads((trained_run() / "config.json").read_text()) | {
        "version": str(folder),
        "vision_pretrained": "",
    }
    (run / "config.json").write_text(json.dumps(settings))
    assert (
        merge.main(["--run", str(run), *model_flags()[:4], "--save_path", str(tmp_path / "other")])
        == 2
    )
    assert "is a backbone; the run" in capsys.readouterr().err


def test_consolidated_weights_inside_a_run_folder_take_its_settings(tmp_path, expected, trained):
    run = tmp_path / "run"
    (run / "ckpt").mkdir(parents=True)
    (run / "config.json").write_text((trained_run() / "config.json").read_text())
    torch.save(trained, run / "pytorch_model.bin")
    assert same(merged_weights(tmp_path / "m", "--weight", run / "pytorch_model.bin"), expected)
    (run / "fp32").mkdir()
    (run / "pytorch_model.bin").rename(run / "fp32" / "pytorch_model.bin")
    assert same(merged_weights(tmp_path / "n", "--weight", run / "fp32"), expected)


@pytest.mark.parametrize("part", ["lora_B", "text_projection"])
def test_weights_that_are_not_numbers_are_named(tmp_path, trained, part, capsys):
    name = next(name for name in trained if part in name)
    torch.save(trained | {name: torch.full_like(trained[name], float("nan"))}, tmp_path / "w.bin")
    argv = ["--weight", str(tmp_path / "w.bin"), "--save_path", str(tmp_path / "m"), *model_flags()]
    assert merge.main(argv) == 2
    assert f"not finite: {name}" in capsys.readouterr().err


def test_the_place_to_write_may_be_here_or_a_link(tmp_path, monkeypatch, capsys):
    (tmp_path / "here ü").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here ü")
    for where, path in ((tmp_path, "link"), (tmp_path / "link", ".")):
        monkeypatch.chdir(where)
        assert merge.main(["--run", str(trained_run()), "--save_path", path]) == 0, (
            capsys.readouterr().err
        )
        assert CoresForReasoningSegmentation.from_pretrained(path).config.model_type == "cores"
        for file in (tmp_path / "here ü").iterdir():
            file.unlink()
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "here ü.partial").exists()
    assert merge.main(["--merged", "x", "--which", "last", "--save_path", "y"]) == 2
    assert "--which" in capsys.readouterr().err


def test_backbones_that_moved_are_told_and_other_alphas_refused(tmp_path, expected, capsys):
    moved = tmp_path / "elsewhere"
    moved.symlink_to(toys() / "llava")
    assert same(
        merged_weights(tmp_path / "m", "--run", trained_run(), "--version", moved), expected
    )
    assert (
        merge.main(
            ["--run", str(trained_run()), "--save_path", str(tmp_path / "n"), "--lora_alpha", "32"]
        )
        == 2
    )
    assert "was trained with 16" in capsys.readouterr().err


def test_a_merged_model_in_another_precision_and_layout(tmp_path, capsys):
    folder = tmp_path / "model"
    assert merge.main(["--run", str(trained_run()), "--save_path", str(folder)]) == 0
    assert (
        merge.main(
            ["--merged", str(folder), "--save_path", str(tmp_path / "half"), "--precision", "bf16"]
        )
        == 0
    )
    assert {w.dtype for n, w in load_file(tmp_path / "half" / "model.safetensors").items()} == {
        torch.bfloat16
    }
    assert merge.main(["--run", str(folder), "--save_path", str(tmp_path / "twice")]) == 2
    assert "is merged already" in capsys.readouterr().err
    assert (
        merge.main(
            ["--merged", str(folder), "--layout", "lisa", "--save_path", str(tmp_path / "lisa")]
        )
        == 2
    )
    assert "refiner" in capsys.readouterr().err
    assert not (tmp_path / "lisa").exists()


def test_a_lisa_run_is_written_in_lisas_layout_and_read_back(tmp_path):
    from cores import train_ds

    argv = [
        flag
        for flag in flags(
            toys(), exp_name="aslisa", method="lisa", epochs=1, eval_mode="teacher_forced"
        )
    ]
    assert train_ds.main(argv) == 0
    run = toys() / "runs" / "aslisa"
    ours = merged_weights(tmp_path / "ours", "--run", run)
    assert (
        merge.main(
            [
                "--run",
                str(run),
                "--layout",
                "lisa",
                "--save_path",
                str(tmp_path / "lisa"),
                "--precision",
                "fp32",
            ]
        )
        == 0
    )
    model = CoresForReasoningSegmentation.from_pretrained(tmp_path / "lisa")
    assert not has_lora(model)
    assert same({name: tensor for name, tensor in model.state_dict().items()}, ours)
    only = ["--eval_only", "--version", str(tmp_path / "lisa"), "--eval_mode", "teacher_forced"]
    assert train_ds.main([*flags(toys(), exp_name="lisaeval", method="lisa"), *only]) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_are_merged_on_one_process(tmp_path, stage):
    name = f"two{stage}"
    common = {
        "lora_dropout": 0,
        "global_batch_size": 4,
        "epochs": 1,
        "zero_stage": stage,
        "no_eval": "true",
    }
    launcher = [
        Path(sys.executable).with_name("deepspeed"),
        "--num_gpus",
        2,
        "--master_port",
        free_port(),
    ]
    command = [*launcher, "train_ds.py", *flags(toys(), exp_name=name, **common)]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    from cores import train_ds

    assert train_ds.main(flags(toys(), exp_name=f"one{stage}", **common)) == 0
    two = merged_weights(tmp_path / "two", "--run", toys() / "runs" / name, "--which", "last")
    one = merged_weights(
        tmp_path / "one", "--run", toys() / "runs" / f"one{stage}", "--which", "last"
    )
    assert same(two, one, tolerance=1e-3)

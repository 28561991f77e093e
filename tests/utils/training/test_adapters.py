"""DoRA, rsLoRA, LoRA+ and adapters in every linear layer, from the command line to the merged
model; and adapters that PEFT itself has saved."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cores import merge_lora_weights_and_save_hf_model as merge
from cores import train_ds
from cores.model import CoresForReasoningSegmentation
from cores.utils import build
from cores.utils.settings.arguments import parse, parse_over
from cores.utils.training import checkpoint
from cores.utils.training.loader import make_loader
from tests.backbone_toys import flags, toys, trained_run
from tests.fork_server import server
from tests.utils.training.test_engine import Stop, losses

EVERYTHING = {
    "use_dora": "true",
    "use_rslora": "true",
    "lora_target_modules": "all-linear",
    "loraplus_lr_ratio": 4,
    "epochs": 1,
    "lora_r": 2,
}


def run(name, **changes):
    assert train_ds.main(flags(toys(), exp_name=name, **changes)) == 0
    return toys() / "runs" / name


def loss_of(model, processor):
    s = parse(flags(toys(), no_eval="true"))
    data = build.build_mixture(s, processor)
    data.set_epoch(0)
    batch = next(iter(make_loader(data, processor, s)[0]))
    with torch.no_grad():
        return model.eval()(batch).loss.item()


def test_a_run_of_everything_goes_on_and_is_merged(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Stop(patch, 2)
        argv = flags(toys(), exp_name="adapters-stopped", **EVERYTHING, no_eval="true")
        assert train_ds.main(argv) == 130
    stopped = run("adapters-stopped", **EVERYTHING, no_eval="true")
    whole = run("adapters", **EVERYTHING, no_eval="true")
    assert losses(stopped) == losses(whole)
    ours, theirs = (checkpoint.read_weights(r / "ckpt" / "last") for r in (stopped, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sum("lora_magnitude_vector" in name for name in ours) == 2 * 7  # layers × linear ones

    model, processor, _ = build.build_trained(whole)
    folder = tmp_path / "model"
    argv = ["--run", str(whole), "--save_path", str(folder)]
    assert merge.main(argv) == 0
    merged = CoresForReasoningSegmentation.from_pretrained(folder)
    # float32; measured: 1e-7
    assert loss_of(merged, processor) == pytest.approx(loss_of(model, processor), rel=1e-5)

    # the same weights without their run: the flags say what they are
    weights = tmp_path / "weights.bin"
    torch.save(ours, weights)
    known = flags(toys())
    keep = ("--version", "--vision_pretrained", "--conv_type", "--refiner", "--exemplar_count")
    known = [part for i, flag in enumerate(known) if flag in keep for part in known[i : i + 2]]
    known += ["--lora_r", "2", "--lora_target_modules", "all-linear", "--use_dora", "--use_rslora"]
    argv = ["--weight", str(weights), "--save_path", str(tmp_path / "again"), *known]
    assert merge.main([*argv, "--precision", "fp32"]) == 0
    again, once = (load_file(tmp_path / n / "model.safetensors") for n in ("again", "model"))
    assert again.keys() == once.keys() and all(torch.equal(again[n], w) for n, w in once.items())


def test_a_continued_run_keeps_its_adapters(capsys):
    name = "adapters-kept"
    run(name, epochs=1, steps_per_epoch=1, no_eval="true")
    for flag in ("use_dora", "use_rslora"):
        changed = {"epochs": 1, "steps_per_epoch": 1, flag: "true"}
        assert train_ds.main(flags(toys(), exp_name=name, **changed)) == 2
        assert f"{flag} was False and is now True" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_of_zero_3_train_what_zero_2_trains(tmp_path):
    """DoRA reads a frozen weight outside of its layer, which ZeRO-3 must fetch."""
    found = []
    for stage in (2, 3):
        name = f"adapters-two-{stage}"
        changes = EVERYTHING | {"zero_stage": stage, "no_eval": "true", "global_batch_size": 4}
        trial = server().run("cores.train_ds", flags(toys(), exp_name=name, **changes), ranks=2)
        assert set(trial.codes) == {0}, trial.output
        folder = tmp_path / name
        argv = ["--run", str(toys() / "runs" / name), "--which", "last"]
        assert merge.main([*argv, "--save_path", str(folder)]) == 0
        found.append(load_file(folder / "model.safetensors"))
    for name, weight in found[0].items():
        # AdamW enlarges differences of gradients that are next to nothing; measured: 4e-5
        torch.testing.assert_close(weight, found[1][name], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_r": 0, "use_dora": "true"}, "--use_dora needs --lora_r above 0"),
        ({"lora_r": 0, "use_rslora": "true"}, "--use_rslora needs --lora_r above 0"),
        ({"lora_r": 0, "loraplus_lr_ratio": 2}, "--loraplus_lr_ratio needs --lora_r above 0"),
        ({"loraplus_lr_ratio": 0.5}, "--loraplus_lr_ratio is 0.5"),
        ({"use_dora": "true", "load_in_8bit": "true"}, "use --load_in_4bit"),
    ],
)
def test_a_flag_that_could_not_act_is_refused(changes, words, capsys):
    assert train_ds.main(flags(toys(), exp_name="adapters-refused", **changes)) == 2
    assert words in capsys.readouterr().err


def test_loraplus_learns_faster_in_b_alone():
    """The first step of AdamW is as long as the learning rate, whatever the gradient; so B, which
    starts at 0, is longer by the ratio."""
    common = {"epochs": 1, "steps_per_epoch": 1, "no_eval": "true", "lora_dropout": 0}
    common |= {"warmup_steps": 0, "max_grad_norm": 1000}
    found = []
    for ratio in (1, 8):
        folder = run(f"loraplus-{ratio}", loraplus_lr_ratio=ratio, **common)
        found.append(checkpoint.read_weights(folder / "ckpt" / "last"))
    once, faster = found
    for name, weight in once.items():
        if ".lora_B." in name:
            torch.testing.assert_close(faster[name], 8 * weight)
            assert weight.abs().max() > 0
        else:
            assert torch.equal(faster[name], weight), name


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
def test_dora_on_four_bits_is_merged_into_full_weights(tmp_path):
    folder = run("dora-few", **EVERYTHING, load_in_4bit="true", no_eval="true")
    argv = ["--run", str(folder), "--which", "last", "--save_path", str(tmp_path / "model")]
    assert merge.main(argv) == 0
    assert all(
        p.isfinite().all() for p in load_file(tmp_path / "model" / "model.safetensors").values()
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "model"
    argv = ["--run", str(trained_run()), "--save_path", str(folder), "--precision", "fp32"]
    assert merge.main(argv) == 0
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True, "target_modules": ["gate_proj", "o_proj"]},
        {"use_rslora": True, "target_modules": r".*language_model.*\.(q_proj|v_proj)"},
    ],
    ids=str,
)
def test_an_adapter_saved_by_peft_is_merged_as_peft_merges_it(finished, options, tmp_path):
    from peft import LoraConfig, get_peft_model

    settings = parse_over({}, ["--version", str(finished), "--precision", "fp32"])
    model, _ = build.build_model(settings)
    tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.3).add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    before = CoresForReasoningSegmentation.from_pretrained(finished).state_dict()
    expected = tuned.merge_and_unload().state_dict()
    argv = ["--weight", str(tmp_path / "adapter"), "--version", str(finished)]
    argv += ["--save_path", str(tmp_path / "merged"), "--precision", "fp32"]
    assert merge.main(argv) == 0
    found = CoresForReasoningSegmentation.from_pretrained(tmp_path / "merged").state_dict()
    changed = {n for n, w in before.items() if not torch.equal(w, found[n])}
    assert len(changed) == 4  # two layers of two kinds
    for name, weight in found.items():
        # float32; measured: 1e-7
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)


def test_flags_that_contradict_an_adapter_are_refused(finished, tmp_path, capsys):
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"x.lora_A.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    argv = ["--weight", str(tmp_path), "--version", str(finished), "--no-use_dora"]
    assert merge.main([*argv, "--save_path", str(tmp_path / "m")]) == 2
    assert f"--use_dora False: {tmp_path} says True" in capsys.readouterr().err

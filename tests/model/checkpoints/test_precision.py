"""Weights in 4 and 8 bits, the choice of attention: through the model, training, chat and
merging."""

import importlib.util
import json

import pytest
import torch

from cores import chat, train_ds
from cores import merge_lora_weights_and_save_hf_model as merge
from cores.model import CoresForReasoningSegmentation
from cores.model.checkpoints.precision import choose_attention, quantization, quantized_bits
from tests.backbone_toys import flags, toys, trained_run
from tests.helpers import conversation, sample, tiny_model

needs_bitsandbytes = pytest.mark.skipif(
    not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model, processor = tiny_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_only_the_language_model_is_held_in_few_bits(saved, bits):
    config = quantization(bits, torch.float32)
    model = CoresForReasoningSegmentation.from_pretrained(
        saved, dtype=torch.float32, quantization_config=config
    )
    assert quantized_bits(model) == bits
    kinds = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    few = {
        name
        for name, kind in kinds.items()
        if kind != "Linear" and "NonDynamicallyQuantizable" not in kind
    }
    layers = "reasoning.llava.model.language_model.layers."
    assert few == {name for name in kinds if name.startswith(layers)}
    assert {p.dtype for p in model.segmenting.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match=f"held in {bits} bits"):
        model.save_pretrained(saved / "again")


@needs_bitsandbytes
def test_eight_bits_change_the_answer_little(saved):
    from cores.dataset.collate import collate
    from cores.model import CoresProcessor

    processor = CoresProcessor.from_pretrained(saved)
    batch = collate([sample(conversation())], processor, processor.levels, processor.conversation)
    full = CoresForReasoningSegmentation.from_pretrained(saved).eval()
    few = CoresForReasoningSegmentation.from_pretrained(
        saved, dtype=torch.float32, quantization_config=quantization(8)
    ).eval()
    a, b = full(batch).low_res[0], few(batch).low_res[0]
    assert 0 < (a - b).abs().max() < 0.2 * a.abs().max()


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_training_on_few_bits_is_merged_into_full_weights(bits, tmp_path):
    name = f"few{bits}"
    argv = flags(
        toys(), exp_name=name, epochs=1, lora_r=2, no_eval="true", **{f"load_in_{bits}bit": "true"}
    )
    assert train_ds.main(argv) == 0
    run = toys() / "runs" / name
    losses = [
        json.loads(line)["loss"]
        for line in (run / "log.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert len(losses) == 3 and all(loss == loss for loss in losses)
    assert (
        merge.main(["--run", str(run), "--which", "last", "--save_path", str(tmp_path / "model")])
        == 0
    )
    assert quantized_bits(CoresForReasoningSegmentation.from_pretrained(tmp_path / "model")) is None


@needs_bitsandbytes
def test_chat_with_four_bits(tmp_path, capsys):
    folder = tmp_path / "model"
    assert merge.main(["--run", str(trained_run()), "--save_path", str(folder)]) == 0
    picture = next((toys() / "data").rglob("*.jpg"))
    capsys.readouterr()
    argv = [
        "--version",
        str(folder),
        "--load_in_4bit",
        "--precision",
        "fp32",
        "--image",
        str(picture),
        "--prompt",
        "the bright thing",
    ]
    code = chat.main(
        [*argv, "--json", "--vis_save_path", str(tmp_path / "out"), "--max_new_tokens", "4"]
    )
    said = capsys.readouterr()
    assert code in (0, 1), said.err
    report = json.loads(said.out)
    assert code == (0 if report["masks"] else 1)


def test_bits_that_cannot_be_had_are_named(monkeypatch):
    with pytest.raises(ValueError, match="choose 4 or 8"):
        quantization(3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        quantization(4)
    assert quantization(None) is None


@pytest.mark.parametrize(
    ("requested", "dtype", "device", "installed", "expected"),
    [
        ("auto", torch.bfloat16, "cuda", True, "flash_attention_2"),
        ("auto", torch.bfloat16, "cuda", False, "sdpa"),
        ("auto", torch.float32, "cuda", True, "sdpa"),
        ("auto", torch.bfloat16, "cpu", True, "sdpa"),
        ("eager", torch.float32, "cpu", False, "eager"),
        ("flash_attention_2", torch.float16, "cuda", True, "flash_attention_2"),
    ],
)
def test_attention_is_chosen_and_explained(
    monkeypatch, requested, dtype, device, installed, expected
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    name, reason = choose_attention(requested, dtype, device)
    assert name == expected and reason


@pytest.mark.parametrize(
    ("dtype", "device", "words"),
    [(torch.bfloat16, "cpu", "NVIDIA"), (torch.float32, "cuda", "flash|bf16")],
)
def test_attention_that_cannot_run_is_refused(dtype, device, words):
    with pytest.raises(ValueError, match=words):
        choose_attention("flash_attention_2", dtype, device)
    with pytest.raises(ValueError, match="choose one of"):
        choose_attention("fastest", dtype, device)


def test_attention_that_was_asked_for_is_used():
    model, _ = tiny_model(attn_implementation="eager")
    assert model.reasoning.llava.model.language_model.config._attn_implementation == "eager"

"""Adapters are what PEFT makes of them, in the language model only, and merging them changes
nothing but the way the weights are held."""

import pytest
import torch
from torch import nn

from cores.model.reasoning.lora import add_lora, fast_parameters, lora_layers, merge_lora
from cores.utils.settings.arguments import parse
from cores.utils.training.deepspeed import parameter_groups
from tests.helpers import conversation, sample, tiny_model

LANGUAGE_MODEL = "reasoning.llava.model.language_model."
KINDS = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"use_dora": True, "use_rslora": True, "target_modules": ["all-linear"]},
]


def adapted(**options):
    """A tiny model and its processor, with adapters that do something."""
    model, processor = tiny_model()
    add_lora(model, **{"r": 4, "alpha": 6, "dropout": 0.0} | options)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name and "magnitude" not in name:
                parameter.normal_(0.0, 0.3)
            elif "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model.eval(), processor


def test_all_linear_is_every_linear_layer_of_the_language_model():
    model, _ = tiny_model()
    before = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    add_lora(model, target_modules=["all-linear"])
    found = {name for name, _ in lora_layers(model)}
    assert found == {name for name in before if name.startswith(LANGUAGE_MODEL)}
    parts = {name.rpartition(".")[2] for name in found}
    assert parts == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("names", [("q_proj", "v_porj"), ("all-linear", "q_proj"), ("fc1",)])
def test_a_name_that_no_layer_has_is_refused(names):
    with pytest.raises(ValueError, match="the language model has no layer"):
        add_lora(tiny_model()[0], target_modules=names)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_merging_is_what_peft_merges(options):
    ours, theirs = adapted(**options)[0], adapted(**options)[0]
    plain = tiny_model()[0]
    merge_lora(ours)
    for name, layer in lora_layers(theirs):
        layer.merge()
        merged = ours.get_submodule(name).weight
        # float32, weights of about 1; measured: 2e-7
        torch.testing.assert_close(merged, layer.get_base_layer().weight, atol=2e-6, rtol=0)
        assert (merged - plain.get_submodule(name).weight).abs().max() > 0.01


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # of the largest logit; measured: 1e-6 and 0.02, where bf16 rounds the merged weight once
    [(torch.float32, 1e-5), (torch.bfloat16, 0.06)],
    ids=str,
)
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_merged_model_says_what_it_said_before(options, dtype, tolerance):
    from cores.dataset.collate import collate

    model, processor = adapted(**options)
    model.to(dtype)
    batch = collate([sample(conversation())], processor, processor.levels, processor.conversation)
    batch = batch.to(dtype=dtype)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model.reasoning.llava.lm_head(model.hidden_states(batch)).float()

    before = logits()
    merge_lora(model)
    difference = (logits() - before).abs().max() / before.abs().max()
    assert difference < tolerance
    plain = tiny_model()[0].eval().to(dtype)
    model = plain
    assert (logits() - before).abs().max() / before.abs().max() > 2 * tolerance


@pytest.mark.parametrize("options", [{}, {"use_dora": True, "target_modules": ["all-linear"]}])
def test_loraplus_has_pefts_groups(options):
    from peft.optimizers import create_loraplus_optimizer

    model, _ = tiny_model()
    add_lora(model, **options)
    language_model = model.get_submodule(LANGUAGE_MODEL[:-1])
    for name, parameter in language_model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    optimizer = create_loraplus_optimizer(
        language_model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=16
    )
    theirs = {id(p) for group in optimizer.param_groups if group["lr"] > 1 for p in group["params"]}
    assert theirs == {id(p) for p in fast_parameters(model)} != set()


def test_loraplus_makes_two_groups_and_a_ratio_of_one_makes_one():
    model, _ = tiny_model()
    add_lora(model)
    (whole,) = parameter_groups(model, parse(["--lr", "0.1"]))
    slow, fast = parameter_groups(model, parse(["--lr", "0.1", "--loraplus_lr_ratio", "16"]))
    assert fast["lr"] == pytest.approx(1.6) and "lr" not in slow
    sizes = [sum(p.numel() for p in group["params"]) for group in (whole, slow, fast)]
    assert sizes[0] == sizes[1] + sizes[2] and min(sizes) > 0

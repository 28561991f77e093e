"""Prefix sharing changes nothing but the time: losses, hidden states and gradients equal those of
separate rows."""

import logging

import pytest
import torch

from cores.dataset.collate import collate
from cores.model.reasoning import prefix_sharing
from cores.model.reasoning.chain import enable_checkpointing
from cores.model.reasoning.lora import add_lora
from cores.model.reasoning.prefix_sharing import PrefixSharing
from cores.model.trainable import set_trainable
from tests.helpers import LEVELS, TEMPLATE, conversation, randomise, sample, tiny_model

EXEMPLARS = [("what is the red wheel?", "It appears on the dog.")]
QUESTIONS = ("where is the dog?", "Please segment the red wheel", "what is a?")


def two_images(processor, exemplars=EXEMPLARS):
    """Three conversations of one image, one with two targets and one of text only, and one of
    another image."""
    first = sample(
        *(conversation(k, question=q) for k, q in zip((1, 2, 0), QUESTIONS, strict=True)), name="0"
    )
    second = sample(conversation(1, question="b"), name="1", seed=1)
    first.exemplars = second.exemplars = exemplars
    return collate([first, second], processor, LEVELS, TEMPLATE)


def trained(dtype=torch.float64):
    model, processor = tiny_model()
    add_lora(model, dropout=0.0)
    set_trainable(model)
    randomise(model, seed=5)
    return model.to(dtype), processor


def results(model, batch, sharing: PrefixSharing):
    """(output, gradient of every trainable weight)."""
    model.zero_grad()
    model.reasoning.sharing = sharing
    output = model(batch)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(one: dict, other: dict) -> float:
    """Of two sets of gradients, relative to the largest entry of each tensor.

    Tensors of rounding noise, such as the gradient of a bias on keys, which softmax cannot feel,
    are measured against a thousandth of the largest gradient instead.
    """
    assert one.keys() == other.keys()
    floor = max(float(g.abs().max()) for g in other.values()) / 1000
    return max(
        float((one[k] - other[k]).abs().max()) / max(float(other[k].abs().max()), floor)
        for k in one
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 5e-7), (torch.float32, 1e-5)])
@pytest.mark.parametrize("row_tokens", [0, 10_000])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_losses_and_gradients_equal_separate_rows(attention, row_tokens, dtype, tolerance):
    model, processor = trained(dtype)
    model.reasoning.llava.set_attn_implementation(attention)
    assert model.reasoning.llava.model.language_model.config._attn_implementation == attention
    batch = two_images(processor).to(dtype=dtype)
    plain, expected = results(model, batch, PrefixSharing(enabled=False))
    shared, found = results(model, batch, PrefixSharing(row_tokens=row_tokens))
    for name, value in plain.losses.items():
        assert torch.allclose(shared.losses[name], value, rtol=tolerance, atol=0), name
    for mine, theirs in zip(shared.low_res, plain.low_res, strict=True):
        assert torch.allclose(mine, theirs, atol=tolerance)
    assert (
        "reasoning.llava.model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight"
        in found
    )
    assert largest_difference(found, expected) < tolerance


def test_hidden_states_equal_where_there_are_tokens():
    model, processor = trained()
    batch = two_images(processor).to(dtype=torch.float64)
    hidden = []
    for enabled in (False, True):
        model.reasoning.sharing = PrefixSharing(enabled)
        with torch.no_grad():
            hidden.append(model.hidden_states(batch)[batch.attention_mask > 0])
    assert torch.allclose(*hidden, rtol=0, atol=1e-12)


def plan(batch, **options):
    return PrefixSharing(**options).plan(
        batch.input_ids, batch.attention_mask, batch.image_index, "sdpa"
    )


def test_the_prefix_is_read_once():
    _, processor = tiny_model()
    batch = two_images(processor)
    packing = plan(batch)
    ids = batch.input_ids[:3]
    shared = int((ids == ids[0]).all(0).long().cumprod(0).sum())
    image_end = int((ids[0] == processor.image_token_id).nonzero().max())
    assert shared > image_end
    lengths = batch.attention_mask.sum(1).tolist()
    assert (
        int((packing.image >= 0).sum())
        == shared + sum(n - shared for n in lengths[:3]) + lengths[3]
    )
    flat = batch.input_ids.flatten()
    assert torch.equal(
        flat[packing.source].flatten()[packing.place][batch.attention_mask > 0],
        batch.input_ids[batch.attention_mask > 0],
    )


def test_every_token_sees_what_it_saw_alone():
    """The mask against its definition: the tokens of one's own conversation up to oneself, each
    once and in order."""
    _, processor = tiny_model()
    batch = two_images(processor)
    for row_tokens in (0, 10_000):
        packing = plan(batch, row_tokens=row_tokens)
        mask, width = packing.mask()[:, 0], packing.source.shape[1]
        for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
            for position in range(length):
                where = int(packing.place[row, position])
                seen = mask[where // width, where % width].nonzero()[:, 0]
                assert (seen + where // width * width).tolist() == packing.place[
                    row, : position + 1
                ].tolist()
                assert packing.positions[where // width, seen].tolist() == list(range(position + 1))
        assert mask.any(-1).all(), "a query that sees nothing gives NaN"


def test_other_exemplars_are_not_shared():
    """What begins differently is compared by its ids: the image stands in each suffix and the
    result is still right."""
    model, processor = trained()
    parts = [
        two_images(processor, [exemplar])
        for exemplar in (("hello there", "a."), ("what is b?", "It is the dog."))
    ]
    first, other = (part.to(dtype=torch.float64) for part in parts)
    length = max(first.input_ids.shape[1], other.input_ids.shape[1])
    for batch in (first, other):
        for name, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
            table = getattr(batch, name)
            setattr(
                batch,
                name,
                torch.nn.functional.pad(table, (0, length - table.shape[1]), value=fill),
            )
    # row 1 with another exemplar than rows 0 and 2
    for name in ("input_ids", "labels", "attention_mask"):
        getattr(first, name)[1] = getattr(other, name)[1]
    image_start = int((first.input_ids[0] == processor.image_token_id).nonzero().min())
    packing = plan(first)
    assert 0 < int(((packing.branch == 0) & (packing.image == 0)).sum()) < image_start
    plain, expected = results(model, first, PrefixSharing(enabled=False))
    shared, found = results(model, first, PrefixSharing())
    assert torch.allclose(shared.loss, plain.loss, rtol=1e-12, atol=0)
    assert largest_difference(found, expected) < 1e-7


def test_equal_conversations_and_nothing_to_share():
    _, processor = tiny_model()
    twice = collate([sample(conversation(), conversation())], processor, LEVELS, TEMPLATE)
    assert int((plan(twice).image >= 0).sum()) == int(twice.attention_mask[0].sum())
    alone = collate(
        [sample(conversation()), sample(conversation(), name="1")], processor, LEVELS, TEMPLATE
    )
    assert plan(alone) is None
    assert plan(two_images(processor), enabled=False) is None


def test_rows_are_filled_up_to_the_budget():
    assert prefix_sharing._rows([5, 9, 4, 3], 0) == [[1], [0, 2], [3]]
    assert prefix_sharing._rows([5, 9, 4, 3], 14) == [[1, 0], [2, 3]]
    assert prefix_sharing._rows([5, 9], 6) == [[1], [0]]


def test_attention_without_masks_falls_back_with_a_message(caplog):
    _, processor = tiny_model()
    batch = two_images(processor)
    prefix_sharing._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert (
                PrefixSharing().plan(
                    batch.input_ids, batch.attention_mask, batch.image_index, "flash_attention_2"
                )
                is None
            )
    assert [record.message for record in caplog.records] == [
        "prefix sharing is off: flash_attention_2 cannot use its mask here; sdpa can"
    ]
    assert (
        PrefixSharing().plan(
            batch.input_ids, batch.attention_mask, batch.image_index, "flex_attention"
        )
        is None
    )


def test_the_mask_of_flex_attention_is_the_same():
    from torch.nn.attention.flex_attention import create_mask

    _, processor = tiny_model()
    packing = plan(two_images(processor), row_tokens=10_000)
    block = packing.block_mask()
    rows, length = packing.source.shape
    assert torch.equal(
        create_mask(block.mask_mod, rows, 1, length, length, device="cpu"), packing.mask()
    )


def test_gradient_checkpointing_and_sharing_go_together():
    model, processor = trained()
    batch = two_images(processor).to(dtype=torch.float64)
    model.train()
    _, expected = results(model, batch, PrefixSharing())
    model.reasoning.llava.gradient_checkpointing_enable({"use_reentrant": False})
    _, found = results(model, batch, PrefixSharing())
    assert largest_difference(found, expected) < 1e-12


@pytest.mark.parametrize("enabled", [True, False])
def test_the_last_layer_works_only_where_it_is_read(enabled):
    """Losses and gradients equal those of a whole last layer, and its MLP sees the supervised
    positions only."""
    model, processor = trained()
    batch = two_images(processor).to(dtype=torch.float64)
    last = model.reasoning.llava.model.language_model.layers[-1]
    seen: list[int] = []
    last.mlp.register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape[:-1].numel())
    )
    inner: list[int] = []
    last.mlp.gate_proj.register_forward_hook(
        lambda module, args, output: inner.append(args[0].shape[:-1].numel())
    )
    found, gradients = results(model, batch, PrefixSharing(enabled))
    whole = model.hidden_states
    model.hidden_states = lambda batch, wanted=None: whole(batch)
    expected, others = results(model, batch, PrefixSharing(enabled))
    assert torch.allclose(found.loss, expected.loss, rtol=1e-10, atol=0)
    assert largest_difference(gradients, others) < 1e-7
    assert inner[0] <= int((batch.labels[:, 1:] >= 0).sum()) < inner[1] == seen[0] == seen[1]
    assert "forward" not in vars(last.mlp)


def test_a_last_layer_that_is_computed_again_is_left_whole():
    """The backward pass would recompute it after the call that knew which positions are wanted."""
    model, processor = trained()
    batch = two_images(processor).to(dtype=torch.float64)
    _, expected = results(model.train(), batch, PrefixSharing())
    layers = model.reasoning.llava.model.language_model.layers
    enable_checkpointing(model.reasoning.llava)
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]
    for last in (False, True):
        layers[-1].gradient_checkpointing = last
        _, found = results(model, batch, PrefixSharing())
        assert largest_difference(found, expected) < 1e-7

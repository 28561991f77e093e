"""The whole model in miniature: wiring, guards, the refiner, what trains, and saving."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from cores.dataset.collate import collate
from cores.model import CoresConfig, CoresForReasoningSegmentation, CoresProcessor, RefinerConfig
from cores.model.build import build_from_backbones
from cores.model.checkpoints.llava import add_level_tokens, load_llava
from cores.model.losses import bce_per_mask, dice_per_mask, pointing_per_token
from cores.model.reasoning.chain import enable_checkpointing
from cores.model.reasoning.lora import add_lora, has_lora, merge_lora
from cores.model.segmenting.chain import TokenRefiner, prototypes
from cores.model.segmenting.frames import to_grid, to_original
from cores.model.segmenting.sam import decode_masks, mask_prompt, no_mask_prompt, position_encoding
from cores.model.trainable import set_trainable
from tests.helpers import (
    LEVELS,
    REALIGNED,
    TEMPLATE,
    backbones,
    conversation,
    gradient_orders,
    randomise,
    sample,
    tiny_model,
    write_llava,
)

CHAINS = [("SEG",), ("LOC", "SEG"), ("LOC", "PART", "SEG")]


def mixed_batch(processor, levels=LEVELS):
    """Two pictures of other sizes; the first row is text only, the others have 2, 1 and 1
    targets."""
    samples = [
        sample(
            conversation(0),
            conversation(2, levels, ignore=True, question="what is red?"),
            name="0",
            seed=1,
        ),
        sample(
            conversation(1, levels, (30, 60), hosts=True),
            conversation(1, levels, (30, 60), question="the wheel"),
            name="1",
            size=(30, 60),
            seed=2,
        ),
    ]
    return collate(samples, processor, levels, TEMPLATE)


@pytest.fixture(scope="module")
def cores():
    """A two-level model whose refiner is no longer the identity, and its batch. Not to be
    changed."""
    model, processor = tiny_model()
    randomise(model.segmenting.refiner, seed=7, scale=0.2)
    return model, processor, mixed_batch(processor)


# ------------------------------------------------------------------------------------------- wiring


@pytest.mark.parametrize("levels", CHAINS)
def test_any_chain_runs_and_learns(levels):
    model, processor = tiny_model(levels)
    batch = mixed_batch(processor, levels)
    set_trainable(model, lora=False)
    output = model.train()(batch)
    assert [tuple(x.shape) for x in output.low_res] == [
        (k, len(levels), 16, 16) for k in (0, 2, 1, 1)
    ]
    assert [tuple(x.shape) for x in output.iou] == [(k, len(levels)) for k in (0, 2, 1, 1)]
    assert output.losses.keys() == {"text", "bce", "dice"}
    parts = output.losses
    assert output.loss.item() == pytest.approx(
        (parts["text"] + 2 * parts["bce"] + 0.5 * parts["dice"]).item(), rel=1e-5
    )
    output.loss.backward()
    trainable = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, grad in trainable.items() if grad is None]
    assert all(grad.isfinite().all() for grad in trainable.values())
    assert not [
        name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None
    ]


@pytest.mark.parametrize(
    ("patches", "select", "count"), [(2, "default", 4), (3, "default", 9), (2, "full", 5)]
)
def test_any_number_of_image_tokens(patches, select, count):
    model, processor = tiny_model(patches=patches, select=select)
    assert processor.image_token_count == count
    batch = mixed_batch(processor)
    assert (batch.input_ids == processor.image_token_id).sum(1).tolist() == [count] * 4
    features = model.reasoning.image_features(batch.clip_pixels)
    assert features.shape == (2, count, 32)
    hidden = model.hidden_states(batch)
    # alone, without padding and through transformers' own merging of the image
    for row in range(4):
        length = int(batch.attention_mask[row].sum())
        alone = model.reasoning.llava(
            input_ids=batch.input_ids[row : row + 1, :length],
            pixel_values=batch.clip_pixels[batch.image_index[row]][None],
            output_hidden_states=True,
        )
        assert torch.allclose(alone.hidden_states[-1][0], hidden[row, :length], atol=1e-5)
        assert torch.allclose(
            alone.logits[0], model.reasoning.llava.lm_head(hidden[row, :length]), atol=1e-4
        )


def test_states_are_those_before_the_tokens(cores):
    model, processor, batch = cores
    hidden = model.hidden_states(batch)
    states = model.reasoning.token_states(hidden, batch.labels, batch.info, [0, 2, 1, 1])
    assert [tuple(s.shape) for s in states] == [(0, 2, 32), (2, 2, 32), (1, 2, 32), (1, 2, 32)]
    loc, seg = processor.tokenizer.convert_tokens_to_ids(["[LOC]", "[SEG]"])
    for row in range(4):
        ids = batch.input_ids[row].tolist()
        for level, token in enumerate((loc, seg)):
            places = [i for i, t in enumerate(ids) if t == token]
            assert len(places) == len(states[row])
            for k, place in enumerate(places):
                assert torch.equal(states[row][k, level], hidden[row, place - 1])


def test_text_loss_equals_transformers(cores):
    model, _, batch = cores
    places = (batch.input_ids == model.reasoning.image_token_id)[..., None]
    embeddings = model.get_input_embeddings()(batch.input_ids)
    features = model.reasoning.image_features(batch.clip_pixels)[batch.image_index]
    theirs = model.reasoning.llava(
        inputs_embeds=embeddings.masked_scatter(places, features),
        attention_mask=batch.attention_mask,
        labels=batch.labels,
    )
    assert model(batch).losses["text"].item() == pytest.approx(theirs.loss.item(), rel=1e-5)


def test_masks_equal_target_by_target(cores):
    """The chain written out for each target alone: projection, decode, refine, decode. Measured:
    2e-6."""
    model, _, batch = cores
    hidden, output, sam = model.hidden_states(batch), model(batch), model.segmenting.sam
    states = model.reasoning.token_states(hidden, batch.labels, batch.info, [0, 2, 1, 1])
    for row in range(1, 4):
        image = int(batch.image_index[row])
        features = sam.image_encoder(batch.sam_pixels[image][None])
        height, width = batch.resized_sizes[image]
        valid = torch.zeros(64, 64)
        valid[:height, :width] = 1
        valid = valid.reshape(4, 16, 4, 16).mean((1, 3))[None]
        for k, (loc, seg) in enumerate(states[row]):
            first, _ = decode_masks(
                sam, features, model.text_projection(loc)[None, None], no_mask_prompt(sam, 1)
            )
            token = model.segmenting.refiner(
                model.text_projection(seg)[None], features, first, valid
            )
            second, iou = decode_masks(sam, features, token[:, None], mask_prompt(sam, first))
            assert torch.allclose(output.low_res[row][k], torch.cat([first, second]), atol=1e-4)
            assert torch.allclose(output.iou[row][k, 1], iou[0], atol=1e-5)


def test_third_level_follows_the_second():
    """Every level is prompted and refined by the mask just before it, not by the first."""
    model, _ = tiny_model(("LOC", "PART", "SEG"))
    chain, sam = model.segmenting, model.segmenting.sam
    randomise(chain.refiner, seed=7, scale=0.2)
    generator = torch.Generator().manual_seed(0)
    tokens, features = (
        torch.randn(2, 3, 32, generator=generator),
        torch.randn(1, 32, 4, 4, generator=generator),
    )
    valid = torch.ones(1, 4, 4)
    masks, _ = chain(tokens, features, torch.zeros(2, dtype=torch.long), valid)
    both, covered = features.expand(2, -1, -1, -1), valid.expand(2, -1, -1)
    token = chain.refiner(tokens[:, 2], both, masks[:, 1], covered)
    third, _ = decode_masks(sam, both, token[:, None], mask_prompt(sam, masks[:, 1]))
    assert torch.allclose(masks[:, 2], third, atol=1e-5)
    assert not torch.allclose(masks[:, 1], masks[:, 0], atol=1e-2)


def test_rows_do_not_depend_on_their_neighbours(cores):
    model, processor, batch = cores
    output = model(batch)
    alone = collate(
        [sample(conversation(2, ignore=True, question="what is red?"), name="0", seed=1)],
        processor,
        LEVELS,
        TEMPLATE,
    )
    assert torch.allclose(model(alone).low_res[0], output.low_res[1], atol=1e-4)


def test_chunks_change_nothing(cores):
    model, _, batch = cores
    expected = torch.cat(model(batch).low_res)
    try:
        for size in (1, 3, 100):
            model.segmenting.decode_chunk = size
            assert torch.allclose(torch.cat(model(batch).low_res), expected, atol=1e-5)
    finally:
        model.segmenting.decode_chunk = None


def test_mask_losses_by_definition():
    """Sums over all masks of the batch, divided by their number; ignored pixels left out; host
    masks at level 0."""
    model, processor = tiny_model(
        level_loss_weights=[0.25, 1.0], pointing_weight=0.5, pointing_host=True
    )
    batch = mixed_batch(processor)
    output = model(batch)
    with torch.no_grad():
        states = torch.cat(
            model.reasoning.token_states(
                model.hidden_states(batch), batch.labels, batch.info, [0, 2, 1, 1]
            )
        )
        tokens = model.text_projection(states)
    position = position_encoding(model.segmenting.sam)[0].flatten(1).T
    bce = dice = pointing = 0.0
    start = 0
    for row in range(4):
        image = int(batch.image_index[row])
        frame = batch.resized_sizes[image]
        for k, target in enumerate(batch.target_masks[row]):
            host = batch.host_masks[row]
            pairs = [(1, 1.0, target)] + ([(0, 0.25, host[k])] if host is not None else [])
            for level, weight, truth in pairs:
                logits = to_original(
                    output.low_res[row][k, level][None], frame, batch.original_sizes[image], 64
                )
                ignore = batch.ignore_masks[row]
                bce += weight * bce_per_mask(logits, truth[None].float(), ignore) / 4
                dice += weight * dice_per_mask(logits, truth[None].float(), ignore) / 4
                area = to_grid(truth[None], frame, 64, 4).flatten(1)
                pointing += pointing_per_token(tokens[start][level][None], position, area) / 4
            start += 1
    assert start == 4
    assert output.losses["bce"].item() == pytest.approx(bce.item(), rel=1e-5)
    assert output.losses["dice"].item() == pytest.approx(dice.item(), rel=1e-5)
    assert output.losses["pointing"].item() == pytest.approx(pointing.item(), rel=1e-5)


def test_ignored_pixels_can_be_trained_as_background():
    batch = mixed_batch(tiny_model()[1])
    without = replace(batch, ignore_masks=[None] * 4)
    excluded, included = tiny_model()[0], tiny_model(ignore_in_loss=False)[0]
    assert included(batch).loss.item() == excluded(without).loss.item()
    assert included(batch).loss.item() != excluded(batch).loss.item()


def test_ignored_pixels_count_at_no_level():
    """The host of an earlier level may be anything where pixels are ignored."""
    model, processor = tiny_model(level_loss_weights=[0.5, 1.0])
    rows = [conversation(2, ignore=True, hosts=True), conversation(1)]
    batch = collate([sample(*rows)], processor, LEVELS, TEMPLATE)
    ignored = batch.ignore_masks[0]
    assert ignored.any() and not ignored.all()
    before = model(batch).losses
    batch.host_masks[0] = batch.host_masks[0] & ~ignored
    after = model(batch).losses
    assert (after["bce"].item(), after["dice"].item()) == pytest.approx(
        (before["bce"].item(), before["dice"].item()), rel=1e-6
    )
    batch.host_masks[0] = batch.host_masks[0] & ignored
    assert model(batch).losses["bce"].item() != pytest.approx(before["bce"].item(), rel=1e-3)
    model.config.ignore_in_loss = False
    assert model(batch).losses["bce"].item() != pytest.approx(after["bce"].item(), rel=1e-3)


def test_text_only_batch_costs_text_only_and_touches_everything():
    """Ranks wait for every trainable weight's gradient, so each has one, of 0, without any mask."""
    model, processor = tiny_model(pointing_weight=0.5)
    set_trainable(model, lora=False)
    batch = collate([sample(conversation(0), conversation(0))], processor, LEVELS, TEMPLATE)
    output = model.train()(batch)
    assert output.loss.item() == output.losses["text"].item()
    assert [x.shape[0] for x in output.low_res] == [0, 0]
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, grad in grads.items() if grad is None]
    assert not [name for name, grad in grads.items() if "text_projection" in name and grad.any()]
    assert any(grad.any() for name, grad in grads.items() if "lm_head" in name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_come_in_the_same_order_whatever_a_batch_holds(checkpointing):
    """ZeRO adds up what ranks put into a bucket side by side, one of them with a batch without
    targets."""
    model, processor = tiny_model(pointing_weight=0.5)
    add_lora(model, dropout=0.0)
    set_trainable(model)
    if checkpointing:
        enable_checkpointing(model.reasoning.llava)
    text_only = collate([sample(conversation(0))], processor, LEVELS, TEMPLATE)
    one_target = collate([sample(conversation(1))], processor, LEVELS, TEMPLATE)
    no_text = replace(
        one_target,
        labels=torch.full_like(one_target.labels, -100),
        target_masks=[torch.zeros(0, 50, 40).bool()],
    )
    orders = []
    for _, order in gradient_orders(
        model, (mixed_batch(processor), text_only, one_target, no_text)
    ):
        orders.append(order)
    assert len(orders[0]) == sum(p.requires_grad for p in model.parameters())
    assert orders[0] == orders[1] == orders[2] == orders[3]


def test_segment_thresholds_in_the_original_frame(cores):
    model, _, batch = cores
    output = model(batch)
    results = model.segment(batch)
    assert [tuple(r.masks.shape) for r in results] == [
        (0, 2, 50, 40),
        (2, 2, 50, 40),
        (1, 2, 30, 60),
        (1, 2, 30, 60),
    ]
    expected = to_original(output.low_res[2][0], batch.resized_sizes[1], (30, 60), 64) > 0
    assert torch.equal(results[2].masks[0], expected)
    assert torch.equal(results[2].iou, output.iou[2])


def test_token_norm():
    """The optional LayerNorm sets the scale that a small SAM hears."""
    model, _ = tiny_model(text_projection_norm=11.0)
    norms = model.text_projection(
        torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    ).norm(dim=1)
    assert norms.tolist() == pytest.approx([11.0] * 50, rel=1e-2)
    assert len(tiny_model()[0].text_projection) == 3


def test_half_precision_runs():
    model, processor = tiny_model(dtype=torch.bfloat16, pointing_weight=0.5)
    set_trainable(model, lora=False)
    output = model.train()(mixed_batch(processor).to(dtype=torch.bfloat16))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.isfinite()
    assert model.segmenting.refiner.attention.out_proj.weight.grad.any()


def test_gradient_checkpointing_changes_nothing():
    model, processor = tiny_model()
    set_trainable(model, lora=False)
    batch = mixed_batch(processor)
    grads = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        model(batch).loss.backward()
        grads.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )
    assert model.reasoning.llava.model.language_model.gradient_checkpointing
    assert grads[0].keys() == grads[1].keys()
    assert any(grad.any() for name, grad in grads[0].items() if "embed_tokens" in name)
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-6), name


def test_frozen_encoders_stay_in_evaluation_mode(cores):
    model, _ = tiny_model()
    model.train()
    assert model.segmenting.sam.mask_decoder.training
    assert model.reasoning.llava.model.language_model.training
    frozen = (model.segmenting.sam.image_encoder, model.segmenting.sam.prompt_encoder)
    assert not any(
        m.training
        for part in (*frozen, model.reasoning.llava.model.vision_tower)
        for m in part.modules()
    )


# ------------------------------------------------------------------------------------------- guards


def test_image_tokens_are_counted_row_by_row(cores):
    """One too many in row 1 and one too few in row 2: the total of the batch is right, the rows are
    not."""
    model, processor, batch = cores
    ids = batch.input_ids.clone()
    ids[2, (ids[2] == processor.image_token_id).nonzero()[0]] = 5
    ids[1, -1] = processor.image_token_id
    with pytest.raises(
        ValueError, match=r"row 1 of the batch: 5 image tokens but 4 image features"
    ):
        model(replace(batch, input_ids=ids))
    ids = torch.where(batch.input_ids == processor.image_token_id, 5, batch.input_ids)
    with pytest.raises(
        ValueError, match=r"row 0 of the batch: 0 image tokens but 4 image features"
    ):
        model(replace(batch, input_ids=ids))


def test_answer_tokens_are_counted_row_by_row(cores):
    model, processor, batch = cores
    labels = batch.labels.clone()
    labels[1, (labels[1] == processor.tokenizer.convert_tokens_to_ids("[LOC]")).nonzero()[0]] = 5
    with pytest.raises(
        ValueError, match=r"toy 0 \(0\.jpg\): \[1, 2\] answer tokens per level but 2 target masks"
    ):
        model(replace(batch, labels=labels))
    masks = [*batch.target_masks[:3], batch.target_masks[3][:0]]
    with pytest.raises(
        ValueError, match=r"toy 1 \(1\.jpg\): \[1, 1\] answer tokens per level but 0 target masks"
    ):
        model(replace(batch, target_masks=masks))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": []}, "levels is"),
        ({"levels": ["SEG", "SEG"]}, "levels is"),
        ({"level_token_ids": [3]}, "level_token_ids has 1 values for 2 levels"),
        ({"level_loss_weights": [1.0]}, "level_loss_weights has 1 values for 2 levels"),
        ({"level_loss_weights": [1.0, 0.0]}, "the last must be above 0"),
        ({"level_loss_weights": [-1.0, 1.0]}, "none may be negative"),
        ({"refiner": {"kind": "magic"}}, "refiner.kind is 'magic'; choose one of none, attention"),
        ({"refiner": {"prototypes": "all"}}, "refiner.prototypes"),
        ({"refiner": {"pooling": "warm"}}, "refiner.pooling"),
        ({"refiner": {"region_grid": 0}}, "refiner.region_grid is 0"),
        ({"refiner": {"heads": 7}}, "refiner.heads 7 does not divide SAM's prompt_dim 256"),
        ({"levels": ["SEG"], "refiner": {"kind": "attention"}}, "SEG is the only level"),
        ({"dice_weight": -1.0}, "dice_weight is -1.0"),
        ({"pointing_host": True}, "pointing_host needs a pointing_weight"),
        (
            {"levels": ["SEG"], "pointing_host": True, "pointing_weight": 1.0},
            "a level before the last",
        ),
        ({"decode_chunk": 0}, "decode_chunk is 0"),
        ({"text_projection_norm": 0.0}, "text_projection_norm is 0.0"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CoresConfig(**fields)


def test_unknown_config_fields_are_refused():
    with pytest.raises(ValueError, match="no such field of CoresConfig: bce_wieght"):
        tiny_model(bce_wieght=1.0)


def test_a_saved_model_answers_greedily_by_default():
    """generation_config.json, which transformers and others read beside the weights."""
    found = tiny_model()[0].generation_config
    assert (found.do_sample, found.max_new_tokens) == (False, 64)


def test_model_without_token_ids_is_refused():
    with pytest.raises(ValueError, match="level_token_ids is missing"):
        CoresForReasoningSegmentation(CoresConfig())


def test_config_round_trip(cores):
    model, _, _ = cores
    again = CoresConfig(**json.loads(model.config.to_json_string()))
    assert again.to_dict() == model.config.to_dict()
    assert again.llava.text_config.hidden_size == 32
    assert again.sam_dims == model.config.sam_dims


# ---------------------------------------------------------------------------------------- backbones


def test_llava_of_another_kind_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_llava(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"config\.json: not found; a model is"):
        load_llava(str(tmp_path))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="needs a model of type 'llava', this is 'llama'"):
        load_llava(str(tmp_path))
    config.write_text(
        json.dumps({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]})
    )
    with pytest.raises(FileNotFoundError, match="no weights here"):
        load_llava(str(tmp_path))


def test_llava_with_missing_weights_is_refused(tmp_path):
    write_llava(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(k for k in weights if k.endswith("linear_1.bias"))
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit the model; missing: .*linear_1\.bias"):
        load_llava(str(tmp_path))


def test_parts_that_do_not_fit_are_refused(tmp_path):
    write_llava(tmp_path)
    preprocessor = tmp_path / "preprocessor_config.json"
    text = preprocessor.read_text()
    preprocessor.write_text(text.replace("32", "48"))
    sam = backbones()[1]
    with pytest.raises(ValueError, match="images of 48×48 pixels, the vision tower takes 32×32"):
        build_from_backbones(str(tmp_path), sam)
    preprocessor.write_text(text)
    config = tmp_path / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"image_token_index": 7}))
    with pytest.raises(ValueError, match=r"the tokenizer's id of <image> is 3, config.json says 7"):
        build_from_backbones(str(tmp_path), sam)


@pytest.mark.parametrize(("tied", "spare_rows"), [(False, 0), (True, 0), (False, 1), (False, 10)])
def test_level_tokens_start_from_the_mean(tied, spare_rows):
    """Whether the tables grow by both rows, by one, or have room for both, as published checkpoints
    do."""
    backbone = load_llava(backbones(tied=tied, spare_rows=spare_rows)[0])
    llava, tokenizer = backbone.model, backbone.tokenizer
    known = len(tokenizer)
    before = [
        t.weight.detach().clone()
        for t in (llava.get_input_embeddings(), llava.get_output_embeddings())
    ]
    ids = add_level_tokens(llava, tokenizer, ["LOC", "SEG"])
    assert ids == [known, known + 1]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[LOC]", "[SEG]"]
    for old, table in zip(
        before, (llava.get_input_embeddings(), llava.get_output_embeddings()), strict=True
    ):
        assert table.weight.shape[0] == max(known + 2, known + spare_rows)
        assert torch.equal(table.weight[:known], old[:known])
        assert torch.allclose(table.weight[ids], old[:known].mean(0).expand(2, -1), atol=1e-6)
    assert llava.config.text_config.vocab_size == llava.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        llava.get_input_embeddings().weight[ids] = 1.0
    assert add_level_tokens(llava, tokenizer, ["LOC", "SEG"]) == ids
    assert (llava.get_input_embeddings().weight[ids] == 1).all()  # a second call resets nothing


# ------------------------------------------------------------------------------------------ refiner


@pytest.mark.parametrize("kind", ["foreground", "foreground+background", "regions"])
@pytest.mark.parametrize("pooling", ["soft", "hard"])
def test_refiner_starts_as_the_identity(kind, pooling):
    torch.manual_seed(0)
    refiner = TokenRefiner(32, RefinerConfig(prototypes=kind, pooling=pooling))
    token = torch.randn(3, 32)
    arguments = token, torch.randn(3, 32, 4, 4), torch.randn(3, 16, 16), torch.ones(3, 4, 4)
    assert torch.equal(refiner(*arguments), token)
    randomise(refiner)
    assert not torch.allclose(refiner(*arguments), token, atol=1e-3)


def trained(model) -> dict[str, torch.Tensor]:
    """The weights that training changes, by name; not copied."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_refiner_learns_and_is_saved():
    """The published one is frozen by PEFT and missing from what trains; ours moves, also under
    LoRA."""
    model, processor = tiny_model()
    add_lora(model)
    set_trainable(model)
    batch = mixed_batch(processor)
    names = [name for name in trained(model) if "refiner" in name]
    assert len(names) == 4
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    start = {name: value.clone() for name, value in trained(model).items()}
    # behind the zero output, the inner projection hears nothing before the second step
    for step in range(2):
        optimizer.zero_grad()
        model.train()(batch).loss.backward()
        attention = model.segmenting.refiner.attention
        assert attention.out_proj.weight.grad.abs().sum() > 0
        assert bool(attention.in_proj_weight.grad.any()) == (step > 0)
        optimizer.step()
    after = trained(model)
    assert all(not torch.equal(start[name], after[name]) for name in names)
    assert {name for name in model.state_dict() if "refiner" in name} == set(names)


def test_no_refiner_has_no_weights():
    model, _ = tiny_model(refiner={"kind": "none"})
    assert not [name for name in model.state_dict() if "refiner" in name]
    assert tiny_model(("SEG",))[0].segmenting.refiner is None


def test_pooling_by_hand():
    """Features are the row index; the mask is sure of the two upper rows, the rightmost column is
    padding."""
    features = torch.arange(4.0)[None, None, :, None].expand(1, 1, 4, 4)
    logits = torch.full((1, 16, 16), -40.0)
    logits[:, :8] = 40.0
    valid = torch.ones(1, 4, 4)
    valid[..., 3] = 0
    pooled, empty = prototypes(
        features, logits, valid, RefinerConfig(prototypes="foreground+background")
    )
    # 5e-4 in the denominator
    assert pooled[0, :, 0].tolist() == pytest.approx([0.5, 2.5], rel=1e-3)
    assert not empty.any()
    marked = features.clone()
    marked[..., 3] = 1000.0  # padding does not get in
    again = prototypes(marked, logits, valid, RefinerConfig())[0]
    torch.testing.assert_close(again, pooled[:, :1], **REALIGNED)
    pooled, empty = prototypes(
        features, logits, valid, RefinerConfig(prototypes="regions", region_grid=2)
    )
    assert pooled[0, :2, 0].tolist() == pytest.approx([0.5, 0.5], rel=1e-3)
    assert empty.tolist() == [[False, False, True, True]]


def test_hard_pooling_thresholds_and_soft_does_not():
    # from 1 on: an empty mask, whose prototype is 0, would be seen
    features = torch.arange(1.0, 5.0)[None, None, :, None].expand(1, 1, 4, 4)
    logits = torch.full((1, 16, 16), -0.1)
    logits[:, :4] = 0.1
    valid = torch.ones(1, 4, 4)
    hard, _ = prototypes(features, logits, valid, RefinerConfig(pooling="hard"))
    soft, _ = prototypes(features, logits, valid, RefinerConfig(pooling="soft"))
    assert hard.item() == pytest.approx(1, abs=1e-3)  # 5e-4 in the denominator
    assert soft.item() == pytest.approx(2.45, abs=0.1)  # nearly the plain mean of 2.5


def test_refiner_survives_empty_masks():
    refiner = TokenRefiner(32, RefinerConfig(prototypes="regions", pooling="hard"))
    randomise(refiner)
    out = refiner(
        torch.ones(2, 32),
        torch.randn(2, 32, 4, 4),
        torch.full((2, 16, 16), -9.0),
        torch.ones(2, 4, 4),
    )
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in refiner.parameters())


def test_last_mask_reaches_the_first_token():
    """The previous logits go on undetached: [LOC] learns from the final mask although no loss looks
    at its own."""
    model, processor = tiny_model(refiner={"kind": "none"})
    batch = mixed_batch(processor)
    tokens = torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    images, counts = model.mask_branch.encode_batch(batch), [0, 2, 1, 1]
    low_res, _ = model.mask_branch.decode_levels(tokens, counts, batch.image_index, images)
    low_res[:, 1].sum().backward()
    assert tokens.grad[:, 0].abs().sum(1).min() > 0


# ------------------------------------------------------------------------------------- LoRA, saving


def test_lora_is_in_the_language_model_only():
    model, _ = tiny_model()
    add_lora(model)
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(names) == 2 * 2 * 2  # layers × (q, v) × (A, B)
    assert all(
        "language_model" in name and ("q_proj" in name or "v_proj" in name) for name in names
    )


def test_what_trains():
    model, _ = tiny_model()
    add_lora(model, r=4)
    sizes = set_trainable(model)
    assert sizes.keys() == {
        "LoRA",
        "token embeddings",
        "lm_head",
        "text projection",
        "mask decoder",
        "refiner",
    }
    assert min(sizes.values()) > 0
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    for part in (
        "vision_tower",
        "multi_modal_projector",
        "image_encoder",
        "prompt_encoder",
        "base_layer",
        "mlp",
    ):
        assert any(part in name for name in frozen), part
    assert not [name for name in trained(model) if "encoder" in name or "vision" in name]


def test_rank_zero_means_no_adapters():
    model, _ = tiny_model()
    add_lora(model, r=0)
    assert not has_lora(model)
    assert "LoRA" not in set_trainable(model, lora=False)
    with pytest.raises(ValueError, match="nothing to train in: LoRA"):
        set_trainable(model)


def test_mask_decoder_can_stay_frozen():
    model, _ = tiny_model()
    set_trainable(model, lora=False, train_mask_decoder=False)
    assert not any(p.requires_grad for p in model.segmenting.sam.parameters())


def test_unknown_lora_targets_are_refused():
    with pytest.raises(ValueError, match="--lora_target_modules z_proj"):
        add_lora(tiny_model()[0], target_modules=("z_proj",))


def test_merge_equals_adapters_and_leaves_the_base_alone():
    model, processor = tiny_model()
    batch = mixed_batch(processor)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    add_lora(model, r=4, alpha=16)
    with torch.no_grad():
        before = model(batch)
        # B starts at 0
        assert before.loss.item() == pytest.approx(tiny_model()[0](batch).loss.item(), rel=1e-6)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
        adapted = model(batch)
        assert abs(adapted.loss - before.loss) > 1e-4
        q = model.reasoning.llava.model.language_model.layers[0].self_attn.q_proj
        a, b = q.lora_A["default"].weight.clone(), q.lora_B["default"].weight.clone()
        assert merge_lora(model) is model
        merged = model(batch)
    assert not has_lora(model)
    assert merged.loss.item() == pytest.approx(adapted.loss.item(), rel=1e-5)
    assert torch.allclose(torch.cat(merged.low_res), torch.cat(adapted.low_res), atol=1e-4)
    key = "reasoning.llava.model.language_model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(model.state_dict()[key], base[key] + 16 / 4 * b @ a, atol=1e-6)
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, base[k])]
    assert len(changed) == 4
    assert model.state_dict().keys() == base.keys()
    with pytest.raises(ValueError, match="no LoRA adapters"):
        merge_lora(model)


def test_adapters_are_not_saved_apart(tmp_path):
    model, _ = tiny_model()
    add_lora(model)
    with pytest.raises(ValueError, match="merge them"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_reload_gives_the_same(tmp_path, tied):
    model, processor = tiny_model(
        tied=tied, text_projection_norm=8.0, refiner={"prototypes": "regions"}, bce_weight=3.0
    )
    randomise(model.segmenting.refiner, seed=5)
    randomise(model.text_projection, seed=6)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    batch, again = mixed_batch(processor), CoresProcessor.from_pretrained(tmp_path)
    assert (again.levels, again.image_token_count, again.template) == (list(LEVELS), 4, TEMPLATE)
    assert again.tokenizer.model_max_length == 256
    loaded_batch = mixed_batch(again)
    assert torch.equal(loaded_batch.input_ids, batch.input_ids)
    assert torch.equal(loaded_batch.clip_pixels, batch.clip_pixels)
    for load in (CoresForReasoningSegmentation, AutoModel):
        loaded = load.from_pretrained(tmp_path).eval()
        assert isinstance(loaded, CoresForReasoningSegmentation)
        assert loaded.config.bce_weight == 3.0
        ours, theirs = model(batch), loaded(loaded_batch)
        # the same numbers at other addresses in memory: sums are vectorised otherwise there
        torch.testing.assert_close(ours.loss, theirs.loss, **REALIGNED)
        torch.testing.assert_close(torch.cat(ours.low_res), torch.cat(theirs.low_res), **REALIGNED)
    buffers = dict(loaded.named_buffers())  # also those that no checkpoint holds
    assert not [
        name for name, value in model.named_buffers() if not torch.equal(value, buffers[name])
    ]
    assert AutoConfig.from_pretrained(tmp_path).model_type == "cores"
    assert (
        AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("[SEG]")
        == model.config.level_token_ids[1]
    )


def test_missing_and_unexpected_weights_are_named(tmp_path):
    model, _ = tiny_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["segmenting.refiner.attention.out_proj.weight"]
    weights["left.over"] = torch.zeros(1)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not fit") as caught:
        CoresForReasoningSegmentation.from_pretrained(tmp_path)
    assert "missing: segmenting.refiner.attention.out_proj.weight" in str(caught.value)
    assert "unexpected: left.over" in str(caught.value)


def test_folders_of_another_kind_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: not found"):
        CoresForReasoningSegmentation.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a backbone without masks; train with it"):
        CoresForReasoningSegmentation.from_pretrained(backbones()[0])
    with pytest.raises(FileNotFoundError, match=r"config\.json: not found"):
        CoresProcessor.from_pretrained(tmp_path)
    (Path(tmp_path) / "cores_processor.json").write_text('{"image_size": ')
    with pytest.raises(ValueError, match=r"cores_processor\.json"):
        CoresProcessor.from_pretrained(tmp_path)

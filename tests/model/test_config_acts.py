"""Every field of a model's configuration acts: with another value, the model has other weights,
other answers or another loss. What a field means is shown by the tests of its part."""

import dataclasses
import inspect
from typing import Any

import pytest
import torch

from cores.dataset.collate import collate
from cores.model.config import CoresConfig, ProposalConfig, RefinerConfig, SamDims, SelectorConfig
from cores.model.segmenting.sam import build_sam
from tests.helpers import (
    LEVELS,
    SAM_DIMS,
    TEMPLATE,
    conversation,
    randomise,
    sample,
    tiny_model,
)

REFINER = {
    "kind": "attention+norm",
    "prototypes": "regions",
    "region_grid": 2,
    "pooling": "hard",
    "heads": 2,
}
REFINER_NEEDS = {"region_grid": {"prototypes": "regions"}}
CORES = {
    "levels": ["PART", "SEG"],
    "text_projection_norm": 4.0,
    "text_weight": 3.0,
    "mask_weight": 3.0,
    "bce_weight": 5.0,
    "dice_weight": 5.0,
    "level_loss_weights": [1.0, 1.0],
    "bce_balance": True,
    "pointing_weight": 1.0,
    "pointing_host": False,
    "ignore_in_loss": False,
    "decode_chunk": 1,
}
CORES_NEEDS = {"pointing_host": {"pointing_weight": 1.0, "pointing_host": True}}
# parts with fields of their own, and the ids that adding the levels to a tokenizer gives
PARTS = {"llava", "sam", "refiner", "selector", "level_token_ids"}
SELECTOR = {
    "features": "dinov2",
    "feature_size": 84,
    "pool_size": 8,
    "place": True,
    "blocks": 1,
    "heads": 2,
    "mlp_dim": 8,
    "iou_hidden": 8,
    "iop_hidden": 8,
    "temperature": 1.0,
    "iop_scale": 5.0,
    "similarity_weight": 3.0,
    "iop_weight": 3.0,
    "rule": "similarity",
    "threshold": 0.9,
    "ranking": "quality",
    "count": 2,
    "chain": True,
}
SELECTOR_BASE = {"features": "sam", "heads": 4, "mlp_dim": 16, "iou_hidden": 16, "count": 5}
SELECTOR_BASE |= {"pool_size": 16, "feature_size": 56, "iop_hidden": 16, "threshold": 0.5}
SELECTOR_NEEDS = {"feature_size": {"features": "dinov2"}}
PROPOSALS = {
    "points_per_side": 2,
    "predicted_iou": 0.3,
    "stability": 1.0,
    "nms": 0.1,
    "long_side": 20,
    "multimask": False,
}
PROPOSALS_BASE = {"points_per_side": 4, "predicted_iou": 0.0, "stability": 0.0, "nms": 1.0}
SAM = {
    "image_size": 32,
    "patch_size": 32,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 4,
    "global_attn_indexes": (),
    "window_size": 4,
    "prompt_dim": 16,
    "decoder_heads": 2,
    "decoder_mlp_dim": 16,
    "mask_in_chans": 8,
    "iou_head_hidden_dim": 8,
}


def test_every_field_is_in_a_table():
    names = lambda config: {f.name for f in dataclasses.fields(config)}  # noqa: E731
    assert names(RefinerConfig) == REFINER.keys()
    # DINOv2's own fields come with its weights; ``proposals`` are those of PROPOSALS
    assert names(SelectorConfig) == SELECTOR.keys() | {"dinov2", "proposals"}
    assert names(ProposalConfig) == PROPOSALS.keys()
    assert names(SamDims) == SAM.keys()
    fields = inspect.signature(CoresConfig).parameters.keys() - {"kwargs"}
    assert fields == CORES.keys() | PARTS


def observed(**config: Any) -> list[Any]:
    """Sizes of the weights, loss, masks and calls of the refiner of a model on one picture."""
    levels = config.pop("levels", None)
    selector = config.get("selector")
    levels = levels or (("SEG",) if selector and not selector.get("chain") else LEVELS)
    model, processor = tiny_model(levels, **config)
    for seed, part in enumerate((model.segmenting.refiner, model.selecting, model.text_projection)):
        if part is not None:
            # an IoP around its threshold, attention that tells prototypes apart
            randomise(part, seed=seed, scale=0.5)
    processor.proposals = model.proposal_source(None)
    rows = [conversation(2, levels, hosts=True, ignore=True), conversation(1, levels)]
    batch = collate([sample(*rows)], processor, levels, TEMPLATE)
    calls: list[int] = []
    if model.segmenting.refiner is not None:  # once for each decoder call beyond the first level
        model.segmenting.refiner.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        loss = float(model(batch).loss)
        decoded = len(calls)
        masks = [found.masks for found in model.segment(batch)]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    attention = [m.num_heads for m in model.modules() if hasattr(m, "num_heads")]
    return [levels, shapes, attention, round(loss, 4), decoded, [m.tolist() for m in masks]]


@pytest.mark.parametrize("name", REFINER)
def test_a_field_of_the_refiner_acts(name):
    base = REFINER_NEEDS.get(name, {})
    assert observed(refiner=base | {name: REFINER[name]}) != observed(refiner=base)


@pytest.mark.parametrize("name", CORES)
def test_a_field_of_the_model_acts(name):
    base = CORES_NEEDS.get(name, {})
    assert observed(**base | {name: CORES[name]}) != observed(**base)


@pytest.mark.parametrize("name", SELECTOR)
def test_a_field_of_the_selector_acts(name, dinov2):
    base = SELECTOR_BASE | {"proposals": PROPOSALS_BASE} | SELECTOR_NEEDS.get(name, {})
    found = [
        observed(selector=config, features_pretrained=dinov2)
        for config in (base, base | {name: SELECTOR[name]})
    ]
    assert found[0] != found[1]


@pytest.mark.parametrize("name", PROPOSALS)
def test_a_field_of_the_proposals_acts(name):
    found = []
    for change in ({}, {name: PROPOSALS[name]}):
        selector = SELECTOR_BASE | {"proposals": PROPOSALS_BASE | change}
        model, _ = tiny_model(("SEG",), selector=selector)
        randomise(model.segmenting.sam.mask_decoder, seed=3, scale=0.3)
        picture = sample(conversation(1)).image
        found.append(model.proposal_source(None)(picture, "a picture").masks)
    assert found[0] != found[1]


@pytest.mark.parametrize("name", SAM)
def test_a_field_of_sam_acts(name):
    """On the sizes of its weights, or where these are the same, on what it computes."""

    def seen(dims: SamDims) -> tuple:
        torch.manual_seed(0)
        sam = build_sam(dims).eval()
        randomise(sam, scale=0.3)
        pixels = torch.randn(1, 3, dims.image_size, dims.image_size)
        with torch.no_grad():
            embedding = sam.image_encoder(pixels)
            tokens = torch.ones(1, 1, dims.prompt_dim)
            dense = torch.zeros_like(embedding)
            position = sam.prompt_encoder.get_dense_pe()
            masks, _ = sam.mask_decoder(embedding, position, tokens, dense, False)
        shapes = [tuple(p.shape) for p in sam.parameters()]
        return shapes, round(masks.double().abs().sum().item(), 3)

    assert seen(dataclasses.replace(SAM_DIMS, **{name: SAM[name]})) != seen(SAM_DIMS)

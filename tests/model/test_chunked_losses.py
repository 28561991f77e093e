"""Losses in pieces: the same numbers and gradients, without what they would keep for the backward
pass."""

import pytest
import torch

from cores.dataset.collate import collate
from cores.model import objective
from cores.model.reasoning import chain as reasoning_chain
from cores.model.trainable import set_trainable
from tests.helpers import LEVELS, TEMPLATE, conversation, sample, tiny_model

SIZE = (150, 130)  # of pictures large enough to tell their masks from low-res ones


def learner(**config):
    model, processor = tiny_model(level_loss_weights=[0.3, 1.0], **config)
    model.double()
    set_trainable(model, lora=False)
    conversations = [
        conversation(k, size=SIZE, hosts=hosts, ignore=not hosts)
        for k, hosts in ((2, True), (1, False))
    ]
    batch = collate([sample(*conversations, size=SIZE)], processor, LEVELS, TEMPLATE).to(
        dtype=torch.float64
    )
    return model, batch


def step(model, batch):
    """(losses, gradients, shapes of what the backward pass keeps)."""
    shapes: list[tuple[int, ...]] = []
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
    ):
        output = model(batch)
    output.loss.backward()
    return output.losses, [p.grad.clone() for p in model.parameters() if p.grad is not None], shapes


@pytest.mark.parametrize(
    ("module", "name", "value"), [(objective, "MASK_PIXELS", 1), (reasoning_chain, "TEXT_CHUNK", 3)]
)
def test_pieces_change_nothing(module, name, value, monkeypatch):
    model, batch = learner()
    expected, gradients, _ = step(model, batch)
    monkeypatch.setattr(module, name, value)
    found, pieces, _ = step(model, batch)
    for key, loss in expected.items():
        assert torch.allclose(found[key], loss, rtol=1e-6)  # the losses themselves are float32
    assert len(gradients) == len(pieces)
    largest = max(float(g.abs().max()) for g in gradients)
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6 * largest)
        for a, b in zip(gradients, pieces, strict=True)
    )


def test_masks_of_the_original_frame_are_not_kept():
    _, _, shapes = step(*learner())
    assert any(shape[-2:] == (16, 16) for shape in shapes), "low-res masks are"
    large = SIZE[0] * SIZE[1]
    assert not [
        s
        for s in shapes
        if len(s) > 1 and s[-2] * s[-1] == large and torch.Size(s).numel() >= large
    ]


def test_logits_of_many_tokens_are_not_kept(monkeypatch):
    model, batch = learner()
    vocabulary = model.reasoning.llava.lm_head.out_features
    _, _, whole = step(model, batch)
    monkeypatch.setattr(reasoning_chain, "TEXT_CHUNK", 3)
    _, _, pieces = step(model, batch)
    tokens = int((batch.labels[:, 1:] >= 0).sum())
    assert (tokens, vocabulary) in whole
    assert (tokens, vocabulary) not in pieces

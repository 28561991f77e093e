"""The flags of speed reach the model, and a run without them has the same curve."""

import pytest
import torch

from cores.dataset.collate import collate
from cores.utils import build
from cores.utils.settings.arguments import parse
from tests.backbone_toys import flags, toys


def curve(**changes) -> list[dict]:
    """The losses of three steps of training without dropout."""
    settings = parse(flags(toys(), lora_dropout=0, **changes))
    torch.manual_seed(0)
    model, processor = build.build_model(settings)
    build.make_trainable(model, settings)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=settings.lr
    )
    data = build.build_mixture(settings, processor)
    rows = []
    for first in range(0, 6, 2):
        batch = collate(
            [data[first], data[first + 1]], processor, processor.levels, processor.template
        )
        output = model.train()(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        rows.append({name: float(value.detach()) for name, value in output.losses.items()})
    return rows


def test_training_has_the_same_curve_with_and_without():
    plain = curve(prefix_sharing="false")
    shared = curve(pack_tokens=500)
    assert len(plain) == len(shared) == 3
    for before, after in zip(plain, shared, strict=True):
        assert after == pytest.approx(before, rel=1e-4)


def test_a_cache_changes_the_curve_by_its_rounding_whatever_it_held_before(tmp_path):
    plain = curve()
    first = curve(sam_cache=tmp_path)
    second = curve(sam_cache=tmp_path)
    assert first == second
    for before, after in zip(plain, first, strict=True):
        assert after == pytest.approx(before, rel=1e-2)


def test_flags_reach_the_model(tmp_path):
    model, processor = build.build_model(
        parse(
            flags(
                toys(),
                prefix_sharing="false",
                pack_tokens=99,
                attn_implementation="eager",
                sam_cache=tmp_path,
            )
        )
    )
    assert (model.reasoning.sharing.enabled, model.reasoning.sharing.row_tokens) == (False, 99)
    assert model.reasoning.llava.model.language_model.config._attn_implementation == "eager"
    assert model.reasoning.llava.model.vision_tower.config._attn_implementation == "sdpa"
    assert processor.sam_cache.root == tmp_path
    model, processor = build.build_model(parse(flags(toys())))
    assert model.reasoning.sharing.enabled
    assert processor.sam_cache is model.segmenting.store_embedding is None

"""The fast image encoder equals segment-anything's own."""

import copy

import pytest
import torch

from cores.model.config import SamDims
from cores.model.segmenting import encoder as sam_encoder
from cores.model.segmenting.encoder import set_fast
from cores.model.segmenting.sam import build_sam
from tests.helpers import randomise

SIZES = {  # windows that fit the grid, that do not, and none
    "fitting": {"window_size": 2},
    "padded": {"window_size": 3},
    "global": {"window_size": 0},
}


def encoder(**fields):
    dims = SamDims(
        image_size=128,
        patch_size=16,
        embed_dim=24,
        depth=3,
        num_heads=3,
        global_attn_indexes=(1,),
        prompt_dim=16,
        decoder_heads=2,
        **fields,
    )
    torch.manual_seed(0)
    module = build_sam(dims).image_encoder.double().eval()
    randomise(module, scale=0.3)  # relative positions start at zero
    return module


def both(module, pixels):
    with torch.no_grad():
        return [set_fast(module, fast)(pixels) for fast in (True, False)]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("pieces", ["whole", "pieces in the cache", "pieces for SDPA"])
def test_equal_to_segment_anything(name, pieces, monkeypatch):
    if pieces != "whole":
        # 7 does not divide 64
        monkeypatch.setattr(sam_encoder, "CPU_SCORES", 64 * 7 if "cache" in pieces else 1 << 30)
        monkeypatch.setattr(sam_encoder, "SDPA_SCORES", 6 * 64 * 7)
    module = encoder(**SIZES[name])
    fast, stock = both(module, torch.randn(2, 3, 128, 128, dtype=torch.float64))
    assert torch.allclose(fast, stock, rtol=0, atol=1e-10)


def test_equal_in_single_precision():
    fast, stock = both(encoder(window_size=3).float(), torch.randn(1, 3, 128, 128))
    assert (fast - stock).abs().max() < 2e-5 * stock.abs().max()


def test_the_bias_of_positions_matters():
    """Otherwise the tests above would not see it left out."""
    module = encoder(window_size=3)
    pixels = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    before, _ = both(module, pixels)
    for block in module.blocks:
        torch.nn.init.zeros_(block.attn.rel_pos_w)
    after, _ = both(module, pixels)
    assert (before - after).abs().max() > 1e-3


def test_a_gradient_can_pass():
    module = encoder(window_size=3)
    grads = []
    for fast in (True, False):
        pixels = torch.ones(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
        set_fast(module, fast)(pixels).square().sum().backward()
        grads.append(pixels.grad)
    assert torch.allclose(*grads, rtol=1e-9, atol=1e-9)


def test_names_and_weights_stay():
    module = encoder(window_size=3)
    stock = set_fast(copy.deepcopy(module), False)
    assert module.state_dict().keys() == stock.state_dict().keys()
    assert type(stock.blocks[0]).__name__ == "Block"
    assert type(module.blocks[0].attn).__name__ == "FastAttention"

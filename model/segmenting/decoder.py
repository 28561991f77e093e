"""SAM's mask decoder with the same weights and results, arranged for many targets.

A few tokens meet thousands of places of the image. Where segment-anything projects every place to
keys, values and queries, the projections are folded into the tokens here. With 7 tokens, 4096
places x of width C = 256 and one head of width d = 16::

    scores   q · (W_k x + b)      =  (W_kᵀ q) · x + q · b      W_k meets 7 tokens, not 4096 places
    values   Σ_p a_p (W_v x_p + b) =  W_v (Σ_p a_p x_p) + b     as the weights a_p sum to 1

The left sides project 4096 places to width d (4096 · 256 · 16 multiplications), the right sides 7
tokens (7 · 256 · 16), and the attention over 256 in place of 16 channels costs less than that. A
place is x = features + position in the scores, and the features alone in the values.

The upscaling convolutions have a kernel as large as their stride, so they are linear maps of every
place, and the pixels are sorted only once they are one number each.

K targets · P = G·G places · C prompt width · n tokens of a target · h heads · d width of a head. A
"place-first mask" is (K, P, 4, 4): for each place the row of its upper left, upper right, lower
left, lower right quarter, twice over.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn


def two_way(
    transformer: TwoWayTransformer, places: Tensor, position: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """places (K, P, C), position (P, C), tokens (K, n, C) -> tokens (K, n, C) and places (K, P,
    C)."""
    queries = tokens
    for layer in transformer.layers:
        queries, places = _layer(layer, queries, places, tokens, position)
    update = _tokens_to_places(
        transformer.final_attn_token_to_image, queries + tokens, places, position
    )
    return transformer.norm_final_attn(queries + update), places


def _layer(
    layer: TwoWayAttentionBlock, queries: Tensor, places: Tensor, tokens: Tensor, position: Tensor
):
    if layer.skip_first_layer_pe:
        queries = layer.self_attn(queries, queries, queries)
    else:
        placed = queries + tokens
        queries = queries + layer.self_attn(placed, placed, queries)
    queries = layer.norm1(queries)
    queries = layer.norm2(
        queries
        + _tokens_to_places(layer.cross_attn_token_to_image, queries + tokens, places, position)
    )
    queries = layer.norm3(queries + layer.mlp(queries))
    places = _places_to_tokens(
        layer.cross_attn_image_to_token, places, position, queries + tokens, queries
    )
    return queries, layer.norm4(places)


def _split(x: Tensor, heads: int) -> Tensor:
    """(K, n, h·d) -> (K, h, n, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _per_head(linear: nn.Linear, heads: int) -> tuple[Tensor, Tensor]:
    """Weight (h, d, C) and bias (h, d) of a projection to heads."""
    return linear.weight.unflatten(0, (heads, -1)), linear.bias.unflatten(0, (heads, -1))


def _scores(
    folded: Tensor, constant: Tensor, places: Tensor, position: Tensor, heads: int
) -> Tensor:
    """folded (K, h, n, C) with every place and its position, plus constant (K, h, n) -> (K, h, n,
    P)."""
    rows = folded.flatten(1, 2)
    of_position = rows @ position.T + constant.flatten(1)[..., None]
    return torch.baddbmm(of_position, rows, places.transpose(1, 2)).unflatten(1, (heads, -1))


def _tokens_to_places(
    attention: Attention, tokens: Tensor, places: Tensor, position: Tensor
) -> Tensor:
    """What the tokens (K, n, C) read from the places (K, P, C) by folded attention: (K, n, C)."""
    heads = attention.num_heads
    q = _split(attention.q_proj(tokens), heads)
    key, key_bias = _per_head(attention.k_proj, heads)
    q = q * q.shape[-1] ** -0.5
    folded = torch.einsum("khnd,hdc->khnc", q, key)
    # A constant over the places does not change the softmax, but ZeRO needs a gradient (here 0) for
    # every weight.
    constant = torch.einsum("khnd,hd->khn", q, key_bias)
    weights = _scores(folded, constant, places, position, heads).softmax(dim=-1)
    mean = (weights.flatten(1, 2) @ places).unflatten(1, (heads, -1))
    value, value_bias = _per_head(attention.v_proj, heads)
    read = torch.einsum("khnc,hdc->knhd", mean, value) + value_bias
    return attention.out_proj(read.flatten(2))


def _places_to_tokens(
    attention: Attention, places: Tensor, position: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """The places (K, P, C) plus what they read by folded attention from the tokens' ``values`` (K,
    n, C) under their ``keys`` (K, n, C), which include the positions: (K, P, C)."""
    heads = attention.num_heads
    k, v = _split(attention.k_proj(keys), heads), _split(attention.v_proj(values), heads)
    k = k * k.shape[-1] ** -0.5
    query, query_bias = _per_head(attention.q_proj, heads)
    folded = torch.einsum("khnd,hdc->khnc", k, query)
    constant = torch.einsum("khnd,hd->khn", k, query_bias)
    weights = _scores(folded, constant, places, position, heads).softmax(dim=2)
    out = attention.out_proj.weight.unflatten(1, (heads, -1))  # (C, h, d)
    # The weights of a head sum to 1 over the tokens, so the bias can go into the few tokens instead
    # of being added to all places.
    written = torch.einsum("khnd,chd->khnc", v, out) + attention.out_proj.bias / heads
    return torch.baddbmm(places, weights.flatten(1, 2).transpose(1, 2), written.flatten(1, 2))


def upscale(decoder: MaskDecoder, places: Tensor, weights: Tensor) -> Tensor:
    """Places (K, P, C) and the weights (K, C / 8) of a mask token -> place-first mask logits (K, P,
    4, 4)."""
    first, norm, act, second, last_act = decoder.output_upscaling
    quarters = act(_layer_norm(norm, _transposed(first, places)))
    pixels = last_act(_transposed(second, quarters))
    return torch.einsum("kpabc,kc->kpab", pixels, weights)


def downscale(network: nn.Sequential, masks: Tensor) -> Tensor:
    """SAM's mask prompt: place-first mask logits (K, P, 4, 4) -> (K, P, C)."""
    layers: list[Any] = list(network)  # segment-anything has no types.
    first, norm, act, second, second_norm, second_act, last = layers
    quarters = act(_layer_norm(norm, _strided(first, masks[..., None])))
    places = second_act(_layer_norm(second_norm, _strided(second, quarters)))
    return F.linear(places, last.weight.flatten(1), last.bias)


def _transposed(conv: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """A transposed convolution of kernel and stride 2: (…, c) -> (…, 4, c'), the quarters by row
    and column."""
    weight = conv.weight.permute(2, 3, 1, 0).reshape(-1, conv.in_channels)
    assert conv.bias is not None, "SAM's convolutions have a bias"
    return F.linear(x, weight, conv.bias.repeat(4)).unflatten(-1, (4, -1))


def _strided(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of kernel and stride 2: quarters (…, 4, c) -> (…, c')."""
    weight = conv.weight.permute(0, 2, 3, 1).reshape(conv.out_channels, -1)
    return F.linear(x.flatten(-2), weight, conv.bias)


def _layer_norm(norm: Any, x: Tensor) -> Tensor:
    """SAM's norm over channels, here the last dimension."""
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def to_pixels(masks: Tensor) -> Tensor:
    """Place-first (K, P, 4, 4) -> (K, 4G, 4G)."""
    grid = round(masks.shape[1] ** 0.5)
    parts = masks.reshape(-1, grid, grid, 2, 2, 2, 2)  # y, x, then row and column of a half, twice
    return parts.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, 4 * grid, 4 * grid)


def to_places(masks: Tensor) -> Tensor:
    """(K, 4G, 4G) -> place-first (K, P, 4, 4)."""
    grid = masks.shape[-1] // 4
    parts = masks.reshape(-1, grid, 2, 2, grid, 2, 2)
    return parts.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, grid * grid, 4, 4)

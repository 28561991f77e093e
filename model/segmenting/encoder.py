"""SAM's image encoder with the same weights and results, in less time and memory.

segment-anything builds the whole table of attention scores, (heads, 4096, 4096) at 1024 pixels,
several times over. Here ``FastAttention`` takes the queries in pieces, each with its own part of
the relative-position bias, and ``FastBlock`` skips the linear layers on the zeros that pad the last
windows, where they give their bias.

B images or windows · (H, W) their grid · C width of the encoder · d width of a head.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import (
    Attention,
    Block,
    ImageEncoderViT,
    get_rel_pos,
    window_unpartition,
)
from torch import Tensor

CPU_SCORES = 1 << 18  # Scores of one piece: 1 MiB of float32 stays in the cache of a core.
SDPA_SCORES = 1 << 26  # Entries of one piece of the bias, all heads: 128 MiB of bfloat16.


def set_fast(encoder: ImageEncoderViT, fast: bool = True) -> ImageEncoderViT:
    """Switches the blocks of an encoder between ours and segment-anything's own; weights and names
    stay. Returns it."""
    for block in encoder.blocks:
        block.__class__ = FastBlock if fast else Block
        block.attn.__class__ = FastAttention if fast else Attention
    return encoder


class FastBlock(Block):
    """A transformer block of SAM's encoder."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        qkv = self.attn.qkv(self.norm1(x))
        if self.window_size:
            size = x.shape[1:3]
            windows, padded = _windows(qkv, self.window_size, self.attn.qkv.bias)
            mixed = window_unpartition(self.attn.mix(windows), self.window_size, padded, size)
        else:
            mixed = self.attn.mix(qkv)
        x = x + self.attn.proj(mixed)
        return x + self.mlp(self.norm2(x))


class FastAttention(Attention):
    """Attention with a relative-position bias that is never held as a whole."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return self.proj(self.mix(self.qkv(x)))

    def mix(self, qkv: Tensor) -> Tensor:
        """The values (B, H, W, C) that each place attends to; ``qkv`` (B, H, W, 3C): its query, key
        and value."""
        batch, height, width, _ = qkv.shape
        q, k, v = qkv.reshape(batch, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        down, across = self._bias_parts(q, height, width)
        learns = torch.is_grad_enabled() and down.requires_grad
        in_cache = qkv.device.type == "cpu" and q.shape[2] ** 2 > CPU_SCORES and not learns
        pieces = _in_cache if in_cache else _with_sdpa
        mixed = pieces(q, k, v, down, across, self.scale)
        return mixed.transpose(1, 2).reshape(batch, height, width, -1)

    def _bias_parts(self, q: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The bias of query i and the key in row y, column x is down[…, i, y] + across[…, i, x].

        q (B, heads, H·W, d) -> (B, heads, H·W, H) and (B, heads, H·W, W).
        """
        grid = q.unflatten(2, (height, width))
        down = torch.einsum("bnhwd,hyd->bnhwy", grid, _rel_pos(height, self.rel_pos_h))
        across = torch.einsum("bnhwd,wxd->bnhwx", grid, _rel_pos(width, self.rel_pos_w))
        return down.flatten(2, 3), across.flatten(2, 3)


def _rel_pos(size: int, table: Tensor) -> Tensor:
    """(size, size, d): the row of ``table`` (2·size − 1, d) for every distance of query and key.
    segment-anything looks it up by indices on the host, which makes a GPU wait in every block."""
    if len(table) != 2 * size - 1:
        return get_rel_pos(size, size, table)  # It resizes the table.
    place = torch.arange(size, device=table.device)
    return table[place[:, None] - place + size - 1]


def _with_sdpa(
    q: Tensor, k: Tensor, v: Tensor, down: Tensor, across: Tensor, scale: float
) -> Tensor:
    """Attention (B, heads, n, d) by torch's own kernels, in as many pieces as the size of the bias
    asks for."""
    batch, heads, count, _ = q.shape
    size = max(1, min(count, SDPA_SCORES // (batch * heads * count)))
    out = []
    for start in range(0, count, size):
        piece = slice(start, start + size)
        bias = (down[:, :, piece, :, None] + across[:, :, piece, None, :]).flatten(3)
        out.append(
            F.scaled_dot_product_attention(q[:, :, piece], k, v, attn_mask=bias, scale=scale)
        )
    return torch.cat(out, dim=2)


def _in_cache(
    q: Tensor, k: Tensor, v: Tensor, down: Tensor, across: Tensor, scale: float
) -> Tensor:
    """The same on a CPU and without a gradient. Attention over 4096 places waits for memory there,
    so every piece is small enough for the cache of a core."""
    out = torch.empty(q.shape, dtype=q.dtype)
    count, height, width = q.shape[2], down.shape[-1], across.shape[-1]
    size = max(1, CPU_SCORES // count)
    scores = q.new_empty((size, height, width))
    for index in np.ndindex(*q.shape[:2]):
        queries, values = q[index].contiguous(), v[index].contiguous()
        keys = k[index].T.contiguous()
        for start in range(0, count, size):
            piece = slice(start, start + size)
            some = scores[: len(queries[piece])]
            torch.add(down[index][piece, :, None], across[index][piece, None, :], out=some)
            table = some.flatten(1).addmm_(queries[piece], keys, alpha=scale)
            torch.softmax(table, dim=-1, out=table)
            torch.mm(table, values, out=out[index][piece])
    return out


def _windows(qkv: Tensor, side: int, bias: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """(B, H, W, 3C) -> windows (B · n, side, side, 3C) and the padded (H, W).

    The padding is what the linear layer gives for zeros: its bias.
    """
    batch, height, width, channels = qkv.shape
    down, across = -(-height // side), -(-width // side)
    if (down * side, across * side) != (height, width):
        padded = bias.expand(batch, down * side, across * side, channels).clone()
        padded[:, :height, :width] = qkv
        qkv = padded
    windows = qkv.reshape(batch, down, side, across, side, channels).transpose(2, 3)
    return windows.reshape(-1, side, side, channels), (down * side, across * side)

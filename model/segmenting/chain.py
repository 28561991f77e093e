"""The chain of segmenting: every level prompts SAM's mask decoder with its own token and the mask
of the level before.

K targets of the whole batch · T levels · C prompt width · G side of SAM's embedding · B images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor, nn

from cores.model.config import RefinerConfig
from cores.model.segmenting.frames import PIXEL_MEAN, PIXEL_STD
from cores.model.segmenting.sam import decode_masks, mask_prompt, no_mask_prompt

# The published refiner adds it to the area, so that a mask without any weight gives a zero
# prototype instead of NaN. Soft weights are never all zero: of an empty mask they give the mean of
# the whole image.
POOLING_EPS = 5e-4


def prototypes(
    features: Tensor, mask_logits: Tensor, valid: Tensor, config: RefinerConfig
) -> tuple[Tensor, Tensor]:
    """Masked average pooling of SAM's embedding under the previous mask (paper: MAP).

    features (K, C, G, G); mask_logits (K, h, w) low-res; valid (K, G, G), 1 in the image and 0 in
    the padding. Returns prototypes (K, n, C) and empty bool (K, n): True where a prototype has no
    pixels and is to be left out of the attention. Attention needs a key, so the first stays where
    all are empty.
    """
    soft, size = config.pooling == "soft", features.shape[-2:]
    weights = mask_logits.sigmoid() if soft else (mask_logits > 0).to(mask_logits.dtype)
    weights = F.interpolate(weights[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    valid = torch.ones_like(weights) if config.pooling == "released" else valid.to(features.dtype)
    inside = (weights * valid)[:, None]
    if config.prototypes == "foreground+background":
        maps = torch.cat([inside, ((1 - weights) * valid)[:, None]], dim=1)
    elif config.prototypes == "regions":
        maps = inside * _regions(features.shape[-1], config.region_grid, features)
    else:
        maps = inside
    mass = maps.sum((2, 3))
    area = mass + POOLING_EPS
    if config.pooling == "released":
        area = (mass.bfloat16() + POOLING_EPS).to(mass.dtype)
    pooled = torch.einsum("kngh,kcgh->knc", maps, features) / area[..., None]
    empty = mass < POOLING_EPS
    empty[:, 0] &= ~empty.all(1)
    return pooled, empty


def _regions(grid: int, per_side: int, like: Tensor) -> Tensor:
    """(1, per_side², G, G): 1 in each of the blocks of a coarse grid."""
    index = torch.arange(grid, device=like.device) * per_side // grid
    block = index[:, None] * per_side + index[None]
    return F.one_hot(block, per_side**2).permute(2, 0, 1)[None].to(like.dtype)


class TokenRefiner(nn.Module):
    """ĥᵗ = h + CA(h, MAP(F, mᵗ⁻¹)) (CoReS, token refiner). It starts as the identity, because its
    output projection is zero.

    The kind "attention+norm" is h + LayerNorm(h + CA), as in the released code; there the gain of
    the norm starts at zero.
    """

    def __init__(self, width: int, config: RefinerConfig):
        super().__init__()
        self.config = config
        self.attention = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.norm = nn.LayerNorm(width) if config.kind == "attention+norm" else None
        self.reset_output()

    def reset_output(self) -> None:
        last = self.attention.out_proj if self.norm is None else self.norm
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(
        self, token: Tensor, features: Tensor, mask_logits: Tensor, valid: Tensor
    ) -> Tensor:
        """token (K, C), features (K, C, G, G), mask_logits (K, h, w), valid (K, G, G) -> (K, C)."""
        keys, empty = prototypes(features, mask_logits, valid, self.config)
        query, attend = token[:, None], self.attention
        update = attend(query, keys, keys, key_padding_mask=empty, need_weights=False)[0][:, 0]
        return token + (update if self.norm is None else self.norm(token + update))


class SegmentingChain(nn.Module):
    """Owns SAM and the refiner; turns answer tokens into one mask per level."""

    def __init__(
        self,
        sam: Sam,
        refiner: RefinerConfig,
        decode_chunk: int | None = None,
        proposes: bool = False,
    ):
        """``proposes``: SAM's everything mode is needed, too, so a copy of the decoder stays
        untrained."""
        super().__init__()
        self.sam = sam
        self.untrained = copy.deepcopy(sam.mask_decoder) if proposes else None
        """SAM's mask decoder before any training of it; saved with the model."""
        self.refiner: TokenRefiner | None = None
        if refiner.kind != "none":
            self.refiner = TokenRefiner(sam.prompt_encoder.embed_dim, refiner)
        self.decode_chunk = decode_chunk
        self.store_embedding: Callable[[str, Tensor], Tensor] | None = None
        """Takes the name and embedding (C, G, G) of an image that a cache lacks, and returns what
        it will give later."""

    @property
    def proposer(self) -> Sam:
        """The SAM as it came, for its everything mode. It shares the encoders, which are never
        trained."""
        if self.untrained is None:
            return self.sam
        encoders = self.sam.image_encoder, self.sam.prompt_encoder
        sam = Sam(*encoders, self.untrained, list(PIXEL_MEAN), list(PIXEL_STD))
        return sam.to(self.sam.pixel_mean.device)

    @torch.no_grad()
    def encode(
        self, pixels: Tensor, cached: tuple[list[Tensor | None], list[str]] | None = None
    ) -> Tensor:
        """SAM's frozen image encoder: (B, 3, S, S) padded and normalised -> (B, C, G, G).

        ``cached``: B embeddings (C, G, G) of a cache and their names in it. Then ``pixels`` are
        only those of images that the cache lacks, and each goes through the encoder alone: what is
        kept must not depend on the batch that an image happened to be in.
        """
        if cached is None:
            return self.sam.image_encoder(pixels)
        missing = iter(pixels)
        embeddings = []
        for embedding, key in zip(*cached, strict=True):
            if embedding is None:
                embedding = self.sam.image_encoder(next(missing)[None])[0]
                if self.store_embedding is not None:
                    embedding = self.store_embedding(key, embedding)
            embeddings.append(embedding)
        return torch.stack(embeddings)

    def forward(
        self, tokens: Tensor, embeddings: Tensor, image_index: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """tokens (K, T, C), embeddings (B, C, G, G), image_index int64 (K,), valid (B, G, G).

        Returns low-res logits (K, T, 4G, 4G) and SAM's own IoU predictions (K, T).
        """
        size, of = self.decode_chunk or max(1, len(tokens)), image_index
        chunks = [slice(i, i + size) for i in range(0, max(1, len(tokens)), size)]
        parts = [self._chain(tokens[c], embeddings[of[c]], valid[of[c]]) for c in chunks]
        return torch.cat([masks for masks, _ in parts]), torch.cat([ious for _, ious in parts])

    def _chain(self, tokens: Tensor, features: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        masks: list[Tensor] = []
        ious: list[Tensor] = []
        dense = no_mask_prompt(self.sam, len(tokens)).to(features.dtype)
        for level in range(tokens.shape[1]):
            token = tokens[:, level]
            if level:
                # The mask is not detached, so the loss of the last mask reaches every level.
                dense = mask_prompt(self.sam, masks[-1])
                if self.refiner is not None:
                    token = self.refiner(token, features, masks[-1], valid)
            mask, iou = decode_masks(self.sam, features, token[:, None], dense)
            masks.append(mask)
            ious.append(iou)
        return torch.stack(masks, dim=1), torch.stack(ious, dim=1)

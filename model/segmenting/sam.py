"""SAM: a model of any size, the prompts of its mask decoder, and a decoder call that serves many
images at once.

The modules are segment-anything's own. K targets · C prompt width · G grid side.
"""

from __future__ import annotations

from functools import partial

import torch
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch import Tensor, nn

from cores.model.config import SamDims
from cores.model.segmenting.decoder import downscale, to_pixels, to_places, two_way, upscale
from cores.model.segmenting.encoder import set_fast
from cores.model.segmenting.frames import PIXEL_MEAN, PIXEL_STD


def build_sam(dims: SamDims) -> Sam:
    """A SAM of these sizes with random weights."""
    encoder = set_fast(
        ImageEncoderViT(
            img_size=dims.image_size,
            patch_size=dims.patch_size,
            embed_dim=dims.embed_dim,
            depth=dims.depth,
            num_heads=dims.num_heads,
            mlp_ratio=4,
            out_chans=dims.prompt_dim,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=dims.window_size,
            global_attn_indexes=dims.global_attn_indexes,
        )
    )
    return Sam(
        image_encoder=encoder,
        prompt_encoder=PromptEncoder(
            embed_dim=dims.prompt_dim,
            image_embedding_size=(dims.grid, dims.grid),
            input_image_size=(dims.image_size, dims.image_size),
            mask_in_chans=dims.mask_in_chans,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=2,
                embedding_dim=dims.prompt_dim,
                mlp_dim=dims.decoder_mlp_dim,
                num_heads=dims.decoder_heads,
            ),
            transformer_dim=dims.prompt_dim,
            iou_head_depth=3,
            iou_head_hidden_dim=dims.iou_head_hidden_dim,
        ),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
    )


def no_mask_prompt(sam: Sam, count: int) -> Tensor:
    """The dense prompt "no mask": (K, C, G, G)."""
    grid = sam.prompt_encoder.image_embedding_size
    return sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(count, -1, *grid)


def mask_prompt(sam: Sam, low_res: Tensor) -> Tensor:
    """Low-res logits (K, h, w) as a dense prompt (K, C, G, G)."""
    places = downscale(sam.prompt_encoder.mask_downscaling, to_places(low_res))
    return places.transpose(1, 2).unflatten(2, sam.prompt_encoder.image_embedding_size)


def position_encoding(sam: Sam) -> Tensor:
    """SAM's positional encoding of every cell, float32 (1, C, G, G), whatever the dtype of the
    weights.

    segment-anything's ``get_dense_pe`` multiplies float32 coordinates by the matrix as it is, which
    fails for a model in half precision; and a phase of many turns needs float32 anyway.
    """
    grid_h, grid_w = sam.prompt_encoder.image_embedding_size
    # The matrix (2, C / 2) has a row for x and one for y.
    frequencies = sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.float()
    x = (torch.arange(grid_w, device=frequencies.device) + 0.5) / grid_w
    y = (torch.arange(grid_h, device=frequencies.device) + 0.5) / grid_h
    centres = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)  # (G, G, 2), (x, y)
    phase = 2 * torch.pi * ((2 * centres - 1) @ frequencies)
    return torch.cat([phase.sin(), phase.cos()], dim=-1).permute(2, 0, 1)[None]


def decode_masks(
    sam: Sam, embeddings: Tensor, sparse: Tensor, dense: Tensor
) -> tuple[Tensor, Tensor]:
    """One mask per row: embeddings (K, C, G, G), sparse (K, n, C), dense (K, C, G, G) -> logits (K,
    4G, 4G), IoU (K,).

    Logits are low-res, IoU is SAM's own estimate, both of the single-mask output (mask token 0).
    segment-anything's ``MaskDecoder.forward`` repeats one image for all prompts; here every row
    brings its image, so the targets of a whole batch are decoded at once. The results are equal.
    """
    decoder = sam.mask_decoder
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).to(sparse.dtype)
    tokens = torch.cat([outputs.expand(len(embeddings), -1, -1), sparse], dim=1)
    position = position_encoding(sam)[0].flatten(1).T.to(embeddings.dtype)
    places = (embeddings + dense).flatten(2).transpose(1, 2)
    out, places = two_way(decoder.transformer, places, position, tokens)
    logits = to_pixels(upscale(decoder, places, decoder.output_hypernetworks_mlps[0](out[:, 1])))
    return logits, decoder.iou_prediction_head(out[:, 0])[:, 0]

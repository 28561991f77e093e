"""The schedule of the published code, on our model: it computes things several times, or in vain.

Every conversation brings its own copy of the image through CLIP and the language model; logits and
projected tokens are made at every position; SAM is segment-anything's own code, one image at a
time; all masks of the original frame are kept for the backward pass. Losses and gradients are ours,
so that the two can be compared step by step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from cores.dataset.collate import Batch
from cores.model import losses
from cores.model.cores import CoresForReasoningSegmentation
from cores.model.segmenting.encoder import set_fast
from cores.model.segmenting.frames import to_original, valid_cells
from cores.model.segmenting.sam import position_encoding


@contextmanager
def stock_parts(model: CoresForReasoningSegmentation) -> Iterator[None]:
    """Makes SAM's image encoder run as segment-anything wrote it. Gradient checkpointing, if it is
    on, covers the last layer of the language model, too, which ours leaves out."""
    encoder = set_fast(model.segmenting.sam.image_encoder, False)
    layers = model.reasoning.llava.model.language_model.layers
    last = layers[-1].gradient_checkpointing
    layers[-1].gradient_checkpointing = layers[0].gradient_checkpointing
    try:
        yield
    finally:
        set_fast(encoder)
        layers[-1].gradient_checkpointing = last


def forward(model: CoresForReasoningSegmentation, batch: Batch) -> dict[str, Tensor]:
    """The losses of a batch, each (): loss, text, bce, dice."""
    with stock_parts(model):
        return _forward(model, batch)


def _forward(model: CoresForReasoningSegmentation, batch: Batch) -> dict[str, Tensor]:
    reasoning, rows = model.reasoning, len(batch.input_ids)
    with torch.no_grad():
        features = reasoning.image_features(batch.clip_pixels[batch.image_index])
    embeddings = reasoning.embed(
        batch.input_ids, features, torch.arange(rows, device=batch.input_ids.device)
    )
    hidden = reasoning.hidden_states(embeddings, batch.attention_mask)
    projected = model.text_projection(hidden)
    logits = reasoning.llava.lm_head(hidden).float()
    parts = {"text": F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())}
    counts = [len(masks) for masks in batch.target_masks]
    tokens = torch.cat(reasoning.token_states(projected, batch.labels, batch.info, counts))
    parts |= _mask_losses(model, batch, tokens, counts)
    return {"loss": model.objective.total(parts)} | parts


def _mask_losses(
    model: CoresForReasoningSegmentation, batch: Batch, tokens: Tensor, counts: list[int]
) -> dict[str, Tensor]:
    c, bce, dice = model.config, [], []
    image_of = batch.image_index.repeat_interleave(torch.tensor(counts, device=tokens.device))
    for image, size in enumerate(batch.original_sizes):
        chosen = (image_of == image).nonzero()[:, 0]
        if not len(chosen):
            continue
        with torch.no_grad():
            # ``forward`` skips what --compile has put around the encoder.
            embedding = model.segmenting.sam.image_encoder.forward(batch.sam_pixels[image][None])
        resized = batch.resized_sizes[image]
        valid = valid_cells(resized, c.sam["image_size"], c.sam_dims.grid, tokens.device)
        low_res = _chain(model, embedding, tokens[chosen], valid)[:, -1]
        logits = to_original(low_res, resized, size, c.sam["image_size"])
        rows = [row for row in range(len(batch.input_ids)) if int(batch.image_index[row]) == image]
        truth = torch.cat([batch.target_masks[row] for row in rows]).float()
        bce.append(losses.bce_per_mask(logits, truth, balance=c.bce_balance))
        dice.append(losses.dice_per_mask(logits, truth))
    return {"bce": torch.cat(bce).mean(), "dice": torch.cat(dice).mean()}


def _chain(
    model: CoresForReasoningSegmentation, embedding: Tensor, tokens: Tensor, valid: Tensor
) -> Tensor:
    """embedding (1, C, G, G), tokens (K, T, C), valid (G, G) -> low-res logits (K, T, 4G, 4G) by
    segment-anything's code."""
    sam, refiner, masks = model.segmenting.sam, model.segmenting.refiner, []
    position = position_encoding(sam).to(embedding.dtype)
    for level in range(tokens.shape[1]):
        token = tokens[:, level]
        if level and refiner is not None:
            images, cells = (
                embedding.expand(len(token), -1, -1, -1),
                valid.expand(len(token), -1, -1),
            )
            token = refiner(token, images, masks[-1], cells)
        _, dense = sam.prompt_encoder(
            points=None, boxes=None, masks=masks[-1][:, None] if level else None
        )
        dense = dense.to(embedding.dtype).expand(len(token), -1, -1, -1)
        low_res, _ = sam.mask_decoder(
            embedding, position, token[:, None], dense, multimask_output=False
        )
        masks.append(low_res[:, 0])
    return torch.stack(masks, dim=1)

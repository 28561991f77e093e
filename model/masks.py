"""Answer tokens become masks: by the chain of segmenting, by selecting among proposals, or by both.

B images · N conversations · M generated tokens · K targets of all conversations · T levels ·
C prompt width · G side of SAM's embedding · (H, W) an image in the original frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cores.dataset.collate import Batch
from cores.dataset.proposals import Proposals
from cores.model.checkpoints.weights import require_finite
from cores.model.config import CoresConfig
from cores.model.segmenting.chain import SegmentingChain
from cores.model.segmenting.frames import to_grid, to_original, valid_cells
from cores.model.segmenting.sam import position_encoding
from cores.model.selecting.selector import Scores, Selector, united


@dataclass
class Segmentation:
    """The masks of one conversation. ``masks``: bool (K, T, H, W), original frame; ``iou``: float
    (K, T), SAM's own prediction, or the highest IoP among the proposals that a selector united."""

    masks: Tensor
    iou: Tensor


@dataclass
class Generation(Segmentation):
    """A free answer, with the masks of every complete group of its answer tokens."""

    token_ids: list[int]
    """Without the end token."""
    text: str
    """The answer as people read it, answer tokens included."""
    finished: bool = True
    """False: the answer was cut at the limit of new tokens."""

    @property
    def emitted(self) -> bool:
        """Whether the answer holds at least one complete group of answer tokens, [LOC] … [SEG] in
        order."""
        return len(self.masks) > 0


@dataclass
class EncodedImages:
    """B images as the mask branch needs them. Encoders make it once, every token of every
    conversation reads it."""

    embeddings: Tensor | None
    """(B, C, G, G): SAM's image embedding; None for a model that only selects by other features."""
    features: Tensor | None
    """(B, c, G', G'): what a selector pools under its proposals, SAM's embedding or DINOv2's
    features; None without a selector."""
    valid: Tensor | None
    """float (B, G, G): the share of every cell that is image rather than padding, for the token
    refiner; None for a model that only selects."""
    original_sizes: list[tuple[int, int]]
    resized_sizes: list[tuple[int, int]]
    proposals: list[Proposals] | None = None


def complete_groups(token_ids: Sequence[int], level_token_ids: Sequence[int]) -> list[list[int]]:
    """Positions of each complete group of level tokens in an answer.

    A group is one token of every level, in order, with anything but level tokens between them. A
    token out of order starts over.
    """
    groups: list[list[int]] = []
    pending: list[int] = []
    for position, token in enumerate(token_ids):
        if token not in level_token_ids:
            continue
        if token != level_token_ids[len(pending)]:
            pending = []
        if token == level_token_ids[len(pending)]:
            pending.append(position)
        if len(pending) == len(level_token_ids):
            groups.append(pending)
            pending = []
    return groups


def group_states(
    states: Sequence[Tensor], answers: Sequence[Sequence[int]], level_token_ids: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """The states of every complete group of level tokens, (K, T, d), and how many groups each
    answer has.

    states: N × (M, d), what predicted each token of ``answers``, N × M token ids.
    """
    groups = [complete_groups(answer, level_token_ids) for answer in answers]
    chosen = [
        state[
            torch.tensor(g, dtype=torch.int64, device=state.device).view(-1, len(level_token_ids))
        ]
        for state, g in zip(states, groups, strict=True)
    ]
    return torch.cat(chosen), [len(g) for g in groups]


@dataclass(frozen=True)
class MaskBranch:
    """From prompt tokens to masks, with the parts that do it.

    The methods take ``prompts`` (K, T, C), the projected answer tokens of N conversations;
    ``counts``, N numbers of targets, which sum to K; ``image_index`` int64 (N,), the image of each
    conversation; and the encoded ``images``.
    """

    config: CoresConfig
    segmenting: SegmentingChain
    selecting: Selector | None

    def require_proposals(self, proposals: list[Proposals] | None) -> None:
        """Raises ValueError for a selector without proposals."""
        if self.selecting is not None and proposals is None:
            raise ValueError(
                "the batch has no proposals; set `processor.proposals ="
                " model.proposal_source(folder)` before collate"
            )

    @torch.no_grad()
    def encode(
        self,
        sam_pixels: Tensor,
        original_sizes: list[tuple[int, int]],
        resized_sizes: list[tuple[int, int]],
        proposals: list[Proposals] | None = None,
        cached: tuple[list[Tensor | None], list[str]] | None = None,
    ) -> EncodedImages:
        """Runs the frozen encoders on B images: SAM's where its embedding is used, and the DINOv2
        of a selector that has one. Arguments as in a Batch; ``sam_pixels`` (B', 3, S, S) are only
        those of images that ``cached`` lacks. Raises ValueError where something is missing."""
        self.require_proposals(proposals)
        embeddings = features = None
        if self.config.decodes or self.selecting is None or self.selecting.encoder is None:
            embeddings = features = self.segmenting.encode(sam_pixels, cached)
        if self.selecting is not None and self.selecting.encoder is not None:
            if len(sam_pixels) != len(resized_sizes):
                raise ValueError("a selector with DINOv2 needs pixels, which SAM's cache left out")
            features = self.selecting.encode(sam_pixels)
        valid = None
        if self.config.decodes:
            dims, device = self.config.sam_dims, sam_pixels.device
            sides = dims.image_size, dims.grid
            valid = torch.stack([valid_cells(size, *sides, device) for size in resized_sizes])
        sizes = original_sizes, resized_sizes
        return EncodedImages(embeddings, features, valid, *sizes, proposals)

    def encode_batch(self, batch: Batch) -> EncodedImages:
        """``encode`` for the images of a batch."""
        sizes = batch.original_sizes, batch.resized_sizes
        return self.encode(batch.sam_pixels, *sizes, batch.proposals, batch.cached)

    def segment_batch(self, prompts: Tensor, counts: list[int], batch: Batch) -> list[Segmentation]:
        """The masks of every conversation of a batch, whose images are encoded for them."""
        if not len(prompts):  # The encoders are the most expensive part, and nothing needs them.
            sizes = [batch.original_sizes[image] for image in batch.image_index.tolist()]
            return [no_masks(prompts.shape[1], size, prompts.device) for size in sizes]
        return self.segment(prompts, counts, batch.image_index, self.encode_batch(batch))

    def segment(
        self, prompts: Tensor, counts: list[int], image_index: Tensor, images: EncodedImages
    ) -> list[Segmentation]:
        """The masks of every conversation: the chain's, the selector's, or the chain's with the
        selector's choice in place of the last one. Raises NonFiniteAnswer."""
        chain = None
        if self.config.decodes:
            logits, iou = self.decode_levels(prompts, counts, image_index, images)
            require_finite(logits, "the logits of the masks")
            masks = self.to_masks(logits, counts, image_index, images)
            chain = [
                Segmentation(mask, ious.float())
                for mask, ious in zip(masks, iou.split(counts), strict=True)
            ]
        if self.selecting is None:
            assert chain is not None, "a model without a selector decodes"
            return chain
        return self._select(prompts, counts, image_index, images, chain)

    def decode_levels(
        self, prompts: Tensor, counts: list[int], image_index: Tensor, images: EncodedImages
    ) -> tuple[Tensor, Tensor]:
        """SAM's decoder, level by level: low-res logits (K, T, 4G, 4G), IoU predictions (K, T)."""
        of_target = _image_of_targets(image_index, counts)
        assert images.embeddings is not None and images.valid is not None
        return self.segmenting(prompts, images.embeddings, of_target, images.valid)

    def score(
        self,
        prompts: Tensor,
        counts: list[int],
        image_index: Tensor,
        images: EncodedImages,
        chain_masks: list[Tensor] | None = None,
    ) -> Scores:
        """Scores of every proposal for every target. ``chain_masks``: N × bool (K, H, W), the
        chain's last mask of each target, which stands among its proposals as one more."""
        assert self.selecting is not None and images.features is not None
        assert images.proposals is not None
        weights = None
        if chain_masks is not None:
            padded, side = self.config.sam["image_size"], self.selecting.config.pool_size
            per_answer = zip(chain_masks, image_index.tolist(), strict=True)
            shares = [to_grid(m, images.resized_sizes[i], padded, side) for m, i in per_answer]
            weights = torch.cat(shares).to(prompts.device)
        of_target = _image_of_targets(image_index, counts)
        position = position_encoding(self.segmenting.sam)
        return self.selecting(
            prompts[:, -1], images.features, images.proposals, of_target, position, weights
        )

    def to_masks(
        self, logits: Tensor, counts: list[int], image_index: Tensor, images: EncodedImages
    ) -> list[Tensor]:
        """Low-res logits (K, T, 4G, 4G) -> N × bool (K, T, H, W), each in its image's frame."""
        out = []
        for some, image in zip(logits.split(counts), image_index.tolist(), strict=True):
            resized, original = images.resized_sizes[image], images.original_sizes[image]
            masks = logits.new_zeros((*some.shape[:2], *original), dtype=torch.bool)
            # Float logits in the original frame are large, so they are made target by target.
            for mask, levels in zip(masks, some, strict=True):
                mask[:] = to_original(levels, resized, original, self.config.sam["image_size"]) > 0
            out.append(masks)
        return out

    def _select(
        self,
        prompts: Tensor,
        counts: list[int],
        image_index: Tensor,
        images: EncodedImages,
        chain: list[Segmentation] | None,
    ) -> list[Segmentation]:
        """The union of what is chosen for every target. It takes the place of the last mask of the
        ``chain``, which is one of the proposals; the levels before it stay."""
        assert self.selecting is not None and images.proposals is not None
        chain_masks = None if chain is None else [found.masks[:, -1] for found in chain]
        scores = self.score(prompts, counts, image_index, images, chain_masks)
        for values in (scores.similarity, scores.iop):  # An absent proposal may have any score.
            require_finite(values[scores.present], "the scores of the proposals")
        chosen = self.selecting.choose(scores)
        confidence = (scores.iop * chosen).amax(1, keepdim=True)
        out = []
        per_answer = zip(
            chosen.split(counts), confidence.split(counts), image_index.tolist(), strict=True
        )
        for n, (picked, iou, image) in enumerate(per_answer):
            masks = united(picked, images.proposals[image], images.original_sizes[image])
            if chain is not None:
                chain_mask = chain[n].masks[:, -1:] & picked[:, -1, None, None, None]
                masks = torch.cat([chain[n].masks[:, :-1], masks | chain_mask], dim=1)
                iou = torch.cat([chain[n].iou[:, :-1], iou], dim=1)
            out.append(Segmentation(masks, iou))
        return out


def no_masks(levels: int, size: tuple[int, int], device: torch.device) -> Segmentation:
    """A conversation without a target about an image of ``size`` (H, W)."""
    masks = torch.zeros((0, levels, *size), dtype=torch.bool, device=device)
    return Segmentation(masks, torch.zeros((0, levels), device=device))


def _image_of_targets(image_index: Tensor, counts: list[int]) -> Tensor:
    """The image, int64 (K,), of every target of the conversations about ``image_index`` (N,)."""
    return torch.from_numpy(np.repeat(image_index.cpu().numpy(), counts)).to(image_index.device)

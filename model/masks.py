"""What is computed once per image, and answer tokens into masks: by the chain of segmenting, by
selection, or by both.

B images · N conversations · M new tokens · d hidden size · K targets · T levels · C prompt width ·
(H, W) original frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dataset.collate import Batch
from dataset.proposals import Proposals
from model.segmenting.frames import to_grid, to_original, valid_cells
from model.segmenting.sam import position_encoding
from model.selecting.selector import Scores, required, united

if TYPE_CHECKING:
    from model.cores import CoresForReasoningSegmentation


@dataclass
class Segmentation:
    """The masks of one conversation. ``masks``: bool (K, T, H, W), original frame; ``iou``: float
    (K, T)."""

    masks: Tensor
    iou: Tensor


class Scene:
    """B images as a model sees them. What looks at them (CLIP, the encoder behind the masks, the
    finder of proposals) runs when it is first asked for, each once."""

    def __init__(
        self,
        model: CoresForReasoningSegmentation,
        clip_pixels: Tensor,
        sam_pixels: Tensor,
        original_sizes: list[tuple[int, int]],
        resized_sizes: list[tuple[int, int]],
        proposals: Callable[[], list[Proposals] | None] = lambda: None,
        cached: tuple[list[Tensor | None], list[str]] | None = None,
    ):
        """clip_pixels (B, 3, h, w), sam_pixels (B', 3, S, S), sizes (height, width) and ``cached``
        as in a Batch; ``proposals`` gives those of each image to a model that selects."""
        self.model = model
        self.original_sizes, self.resized_sizes = original_sizes, resized_sizes
        self._clip_pixels, self._sam_pixels, self._cached, self._find = (
            clip_pixels,
            sam_pixels,
            cached,
            proposals,
        )

    @classmethod
    def of(cls, model: CoresForReasoningSegmentation, batch: Batch) -> Scene:
        sizes = batch.original_sizes, batch.resized_sizes
        return cls(
            model,
            batch.clip_pixels,
            batch.sam_pixels,
            *sizes,
            lambda: batch.proposals,
            batch.cached,
        )

    @cached_property
    def features(self) -> Tensor:
        """(B, P, d): image tokens of the language model."""
        return self.model.reasoning.image_features(self._clip_pixels)

    @cached_property
    def _seen(self) -> tuple[Tensor | None, Tensor | None]:
        """What the mask branch sees of the images, see ``mask_features`` of the model."""
        seen = self.model.mask_features(self._sam_pixels, self.resized_sizes, self._cached)
        del self._sam_pixels  # 12 MB a picture, not needed again
        return seen

    @property
    def embeddings(self) -> Tensor:
        """(B, C, G, G): SAM's, for a model that decodes masks."""
        return self._seen[0]

    @cached_property
    def proposals(self) -> list[Proposals]:
        return required(self._find())

    def look(self) -> None:
        """Does now what the first mask would wait for."""
        _ = self._seen
        if self.model.selecting is not None:
            _ = self.proposals

    @cached_property
    def _valid(self) -> Tensor:
        dims, device = self.model.config.sam_dims, self.embeddings.device
        return torch.stack(
            [valid_cells(size, dims.image_size, dims.grid, device) for size in self.resized_sizes]
        )

    def segment(
        self, states: Sequence[Tensor], answers: Sequence[Sequence[int]], image_index: Tensor
    ) -> list[Segmentation]:
        """Masks of every complete group of answer tokens.

        states: N × (M, d), the hidden states that predicted the tokens of ``answers``, N × M ids;
        image_index (N,).
        """
        groups = [complete_groups(answer, self.model.config.level_token_ids) for answer in answers]
        positions = [
            torch.tensor(g, dtype=torch.int64).reshape(-1, len(self.model.config.levels))
            for g in groups
        ]
        chosen = torch.cat(
            [state[where.to(state.device)] for state, where in zip(states, positions, strict=True)]
        )
        return self.masks(self.model.text_projection(chosen), [len(g) for g in groups], image_index)

    def masks(self, tokens: Tensor, counts: list[int], image_index: Tensor) -> list[Segmentation]:
        """The one place where tokens become masks: (K, T, C) of N conversations with ``counts``
        targets each, which ask about the images image_index (N,)."""
        images = image_index.tolist()
        if not len(tokens):  # the encoder is the most expensive part: nothing asks for it here
            nothing = tokens.new_zeros((0, tokens.shape[1]), dtype=torch.float32)
            return [
                Segmentation(
                    nothing.new_zeros((*nothing.shape, *self.original_sizes[i]), dtype=torch.bool),
                    nothing,
                )
                for i in images
            ]
        found = self.chain(tokens, counts, image_index) if self.model.config.decodes else None
        return (
            found
            if self.model.selecting is None
            else self._select(tokens, counts, image_index, found)
        )

    def decode(
        self, tokens: Tensor, counts: list[int], image_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """SAM's decoder on tokens (K, T, C), see ``masks``: low-res logits (K, T, 4G, 4G) and its
        own IoU predictions (K, T)."""
        # the image encoder is the most expensive part: nothing asks for it here
        if not sum(counts):
            levels, side = tokens.shape[1], self.model.config.sam_dims.low_res
            return tokens.new_zeros((0, levels, side, side)), tokens.new_zeros((0, levels))
        return self.model.segmenting(
            tokens, self.embeddings, _of_target(image_index, counts), self._valid
        )

    def chain(self, tokens: Tensor, counts: list[int], image_index: Tensor) -> list[Segmentation]:
        """The masks of the chain of segmenting; arguments as of ``masks``."""
        low_res, iou = self.decode(tokens, counts, image_index)
        return [
            Segmentation(self.in_frame(masks, image), ious.float())
            for masks, ious, image in zip(
                low_res.split(counts), iou.split(counts), image_index.tolist(), strict=True
            )
        ]

    def score(
        self,
        tokens: Tensor,
        counts: list[int],
        image_index: Tensor,
        own: list[Tensor] | None = None,
    ) -> Scores:
        """Of every proposal for every target. ``own``: N × bool (K, H, W), one more proposal of
        each target."""
        model, weights = self.model, None
        if own is not None:
            padded, side = model.config.sam["image_size"], model.selecting.config.pool_size
            images = image_index.tolist()
            weights = [
                to_grid(m, self.resized_sizes[i], padded, side)
                for m, i in zip(own, images, strict=True)
            ]
            weights = torch.cat(weights).to(tokens.device)
        of_target, position = (
            _of_target(image_index, counts),
            position_encoding(model.segmenting.sam),
        )
        return model.selecting(
            tokens[:, -1], self._seen[1], self.proposals, of_target, position, weights
        )

    def _select(
        self,
        tokens: Tensor,
        counts: list[int],
        image_index: Tensor,
        chain: list[Segmentation] | None,
    ) -> list[Segmentation]:
        """The union of what is chosen for every target; its ``iou`` is the highest IoP among it, 0
        where nothing is chosen.

        It takes the place of the last mask of the ``chain``, which is one of the proposals; the
        levels before it stay.
        """
        own = None if chain is None else [found.masks[:, -1] for found in chain]
        scores = self.score(tokens, counts, image_index, own)
        chosen = self.model.selecting.choose(scores)
        sure = (scores.iop * chosen).amax(1, keepdim=True)
        out = []
        for n, (picked, iop, image) in enumerate(
            zip(chosen.split(counts), sure.split(counts), image_index.tolist(), strict=True)
        ):
            masks = united(picked, self.proposals[image], self.original_sizes[image])
            if chain is not None:
                masks = masks | (own[n] & picked[:, -1, None, None])[:, None]
                masks = torch.cat([chain[n].masks[:, :-1], masks], dim=1)
                iop = torch.cat([chain[n].iou[:, :-1], iop], dim=1)
            out.append(Segmentation(masks, iop))
        return out

    def in_frame(self, low_res: Tensor, image: int) -> Tensor:
        """Low-res logits (K, T, h, w) of targets in one image -> bool (K, T, H, W), target by
        target: logits are large."""
        resized, original = self.resized_sizes[image], self.original_sizes[image]
        out = torch.zeros((*low_res.shape[:2], *original), dtype=torch.bool, device=low_res.device)
        for target, levels in enumerate(low_res):
            out[target] = (
                to_original(levels, resized, original, self.model.config.sam["image_size"]) > 0
            )
        return out


def _of_target(image_index: Tensor, counts: list[int]) -> Tensor:
    """The image (K,) of every target: of conversations about the images image_index (N,), with
    ``counts`` targets each."""
    return image_index.repeat_interleave(torch.tensor(counts, device=image_index.device))


def complete_groups(answer: Sequence[int], level_token_ids: Sequence[int]) -> list[list[int]]:
    """Positions of each complete group of level tokens in an answer.

    A group is one token of every level, in order, with anything but level tokens between them. A
    token out of order starts over.
    """
    groups: list[list[int]] = []
    pending: list[int] = []
    for position, token in enumerate(answer):
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

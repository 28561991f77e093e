"""What is minimised: the text loss beside the losses of the masks, of the selection, or of both.

L = λ_text · CE + λ_mask · (λ_bce · BCE + λ_dice · DICE) + …, the paper's equations 5 and 6; the
weights are fields of CoresConfig. The terms themselves are pure functions in model/losses.py and
model/selecting/targets.py.

N conversations · K targets of all conversations · k targets of one image · T levels · C prompt
width · G side of SAM's embedding · (H, W) an image in the original frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cores.dataset.collate import Batch
from cores.model import losses
from cores.model.config import CoresConfig
from cores.model.segmenting.chain import SegmentingChain
from cores.model.segmenting.frames import to_grid, to_original
from cores.model.segmenting.sam import position_encoding
from cores.model.selecting.selector import Scores, Selector
from cores.model.selecting.targets import proposal_targets

MASK_PIXELS = 1 << 22  # pixels whose logits the mask losses hold at a time: 16 MB a copy


@dataclass
class ImageTargets:
    """All targets of one image, whichever of its conversations asks for them."""

    index: Tensor
    """int64 (k,): which of the K targets of the batch they are."""
    masks: Tensor
    """bool (k, H, W)."""
    ignore: Tensor | None
    """bool (k, H, W): pixels that are left out of the loss; None where there are none."""
    hosts: Tensor
    """bool (k, H, W): the object that holds each target, empty where the data do not know it."""
    has_host: Tensor
    """bool (k,)."""
    resized: tuple[int, int]
    """(height, width) in the resized frame."""


def targets_per_image(batch: Batch, counts: list[int], use_ignore: bool) -> Iterator[ImageTargets]:
    """The targets of a batch, image by image; images without a target are left out.

    ``counts``: targets of each conversation. ``use_ignore`` False trains ignored pixels as
    background, as the published code does.
    """
    device, starts = batch.input_ids.device, np.cumsum([0, *counts])
    rows_of: dict[int, list[int]] = {}
    for row, image in enumerate(batch.image_index.tolist()):
        if counts[row]:
            rows_of.setdefault(image, []).append(row)
    for image, rows in rows_of.items():
        nothing = torch.zeros(batch.original_sizes[image], dtype=torch.bool, device=device)
        ignores = [batch.ignore_masks[row] for row in rows] if use_ignore else []
        hosts = [batch.host_masks[row] for row in rows]
        targets = [counts[row] for row in rows]
        yield ImageTargets(
            index=torch.cat([torch.arange(starts[r], starts[r + 1], device=device) for r in rows]),
            masks=torch.cat([batch.target_masks[row] for row in rows]),
            ignore=_stacked(ignores, targets, nothing)
            if any(mask is not None for mask in ignores)
            else None,
            hosts=_stacked(hosts, targets, nothing),
            has_host=torch.tensor(
                np.repeat([h is not None for h in hosts], targets), device=device
            ),
            resized=batch.resized_sizes[image],
        )


def _stacked(masks: list[Tensor | None], counts: list[int], nothing: Tensor) -> Tensor:
    """bool (k, H, W) of conversations with ``counts`` targets and one mask for all of them, one for
    each, or None, which stands for ``nothing`` (H, W)."""
    given = [nothing if mask is None else mask for mask in masks]
    return torch.cat([m.expand(n, *nothing.shape) for m, n in zip(given, counts, strict=True)])


@dataclass(frozen=True)
class Objective:
    """The losses of a batch, with the parts of the model that they need.

    ``prompts`` (K, T, C) are the projected answer tokens, ``counts`` the N numbers of targets.
    """

    config: CoresConfig
    segmenting: SegmentingChain
    selecting: Selector | None

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """The loss () of its unweighted parts, each ()."""
        c = self.config
        loss, branches = c.text_weight * parts["text"], parts["text"].new_zeros(())
        if c.decodes:
            branches = branches + c.bce_weight * parts["bce"] + c.dice_weight * parts["dice"]
        if self.selecting is not None:
            s = self.selecting.config
            branches = branches + s.similarity_weight * parts["similarity"]
            branches = branches + s.iop_weight * parts["iop"]
        loss = loss + c.mask_weight * branches
        return loss + c.pointing_weight * parts["pointing"] if "pointing" in parts else loss

    def mask_losses(
        self, logits: Tensor, prompts: Tensor, batch: Batch, counts: list[int]
    ) -> dict[str, Tensor]:
        """Of the low-res logits (K, T, 4G, 4G): bce, dice and, where it is used, pointing, each ().

        They are sums over masks divided by the number of masks of the batch. The last level is
        compared with the target, an earlier one with the host mask, where the data have it and
        ``level_loss_weights`` ask for it.
        """
        c, count = self.config, len(logits)
        zero = logits.new_zeros((), dtype=torch.float32)
        parts = dict.fromkeys(["bce", "dice", *(["pointing"] if c.pointing_weight else [])], zero)
        for targets in targets_per_image(batch, counts, c.ignore_in_loss):
            for level, weight in enumerate(c.level_loss_weights):
                if not weight:
                    continue
                last = level == len(c.levels) - 1
                chosen = slice(None) if last else targets.has_host
                ground_truth = (targets.masks if last else targets.hosts)[chosen]
                ignore = None if targets.ignore is None else targets.ignore[chosen]
                low_res = logits[targets.index[chosen], level]
                bce, dice = self.bce_and_dice(low_res, ground_truth, ignore, targets.resized)
                parts["bce"] = parts["bce"] + weight * bce / count
                parts["dice"] = parts["dice"] + weight * dice / count
            if c.pointing_weight:
                pointing = self._pointing(prompts[targets.index], targets)
                parts["pointing"] = parts["pointing"] + pointing / count
        return parts

    def selection_losses(
        self,
        scores: Scores,
        prompts: Tensor,
        batch: Batch,
        counts: list[int],
        chain_masks: list[Tensor] | None,
    ) -> dict[str, Tensor]:
        """Of a selector's scores: similarity, iop and, without a chain, pointing where it is used.

        ``chain_masks``: N × bool (K, H, W), which stand among the proposals as the last column.
        """
        assert self.selecting is not None
        width, use_ignore = scores.iop.shape[1], self.config.ignore_in_loss
        iou, iop = proposal_targets(batch, width, use_ignore, chain_masks)
        parts = self.selecting.losses(scores, iou, iop)
        # With a chain, the mask losses already contain the pointing loss.
        if self.config.pointing_weight and chain_masks is None:
            parts["pointing"] = prompts.float().sum() * 0.0
            for targets in targets_per_image(batch, counts, use_ignore=False):
                pointing = self._pointing(prompts[targets.index], targets) / len(prompts)
                parts["pointing"] = parts["pointing"] + pointing
        return parts

    def without_targets(self, prompts: Tensor) -> dict[str, Tensor]:
        """The losses of a batch without targets: all 0, but every weight takes part in them.

        ZeRO-2 puts gradients into its buckets as they come, so a rank without targets must bring
        the same gradients in the same order as the others; otherwise gradients of different weights
        are added up. ``prompts`` (1, T, C) is therefore sent through chain and selector; without a
        gradient there is none, (0, T, C).
        """
        c = self.config
        parts: dict[str, Tensor] = {}
        index = torch.zeros(1, dtype=torch.int64, device=prompts.device)
        zero = prompts.float().sum() * 0.0
        pointing = ["pointing"] if c.pointing_weight else []
        if c.decodes:
            if len(prompts):
                dims = c.sam_dims
                image = prompts.new_zeros((1, dims.prompt_dim, dims.grid, dims.grid))
                logits, _ = self.segmenting(prompts, image, index, torch.ones_like(image[:, 0]))
                zero = (logits.float().sum() + prompts.float().sum()) * 0.0
            parts |= dict.fromkeys(["bce", "dice", *pointing], zero)
        if self.selecting is not None:
            if len(prompts):
                position = position_encoding(self.segmenting.sam)
                scores = self.selecting.stand_in(prompts[:, -1], index, position)
                selected = scores.similarity.sum() + scores.iop.sum()
                zero = (selected + prompts.float().sum()) * 0.0
            names = ["similarity", "iop", *([] if c.decodes else pointing)]
            parts |= dict.fromkeys(names, zero)
        return parts

    def bce_and_dice(
        self, low_res: Tensor, ground_truth: Tensor, ignore: Tensor | None, resized: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Sums of BCE and of DICE, each (): low-res logits (k, h, w) of one image against bool
        (k, H, W), without the pixels of ``ignore`` (k, H, W).

        Logits of the original frame are made for as many masks at a time as MASK_PIXELS allow. With
        a gradient they are computed again in the backward pass instead of kept.
        """
        height, width = ground_truth.shape[1:]

        def compare(low_res: Tensor, target: Tensor, ignore: Tensor | None) -> Tensor:
            padded = self.config.sam["image_size"]
            logits = to_original(low_res, resized, (height, width), padded)
            bce = losses.bce_per_mask(logits, target.float(), ignore, self.config.bce_balance)
            dice = losses.dice_per_mask(logits, target.float(), ignore)
            return torch.stack([bce.sum(), dice.sum()])

        sums = low_res.new_zeros(2, dtype=torch.float32)
        step = max(1, MASK_PIXELS // (height * width))
        learns = torch.is_grad_enabled() and low_res.requires_grad
        for start in range(0, len(low_res), step):
            piece = slice(start, start + step)
            left_out = None if ignore is None else ignore[piece]
            compare_piece = partial(compare, target=ground_truth[piece], ignore=left_out)
            if learns:
                sums = sums + checkpoint(
                    compare_piece, low_res[piece], use_reentrant=False, preserve_rng_state=False
                )
            else:
                sums = sums + compare_piece(low_res[piece])
        return sums[0], sums[1]

    def _pointing(self, prompts: Tensor, targets: ImageTargets) -> Tensor:
        """Sum of the pointing losses of one image, (), for its prompts (k, T, C): the last level
        points at the target and, with ``pointing_host``, the others at the host."""
        dims = self.config.sam_dims
        position = position_encoding(self.segmenting.sam)[0].flatten(1).T

        def loss(prompts: Tensor, masks: Tensor) -> Tensor:
            area = to_grid(masks, targets.resized, dims.image_size, dims.grid).flatten(1)
            return losses.pointing_per_token(prompts.float(), position, area).sum()

        total = loss(prompts[:, -1], targets.masks)
        if self.config.pointing_host and targets.has_host.any():
            for level in range(prompts.shape[1] - 1):
                hosts = targets.hosts[targets.has_host]
                total = total + loss(prompts[targets.has_host, level], hosts)
        return total

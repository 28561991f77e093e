"""Proposals: what SAM finds in a picture when nobody says what to look for (segment-anything's
everything mode).

The generator is segment-anything's own. Its settings and a fingerprint of SAM's weights name the
folder of the store (dataset/proposals.py), so proposals of other settings or of another SAM are
never mixed.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import Sam

from cores.dataset.proposals import Found, ProposalSource, ProposalStore, encode_counts
from cores.model.config import ProposalConfig, SelectorConfig
from cores.model.segmenting.chain import SegmentingChain
from cores.model.segmenting.frames import resize_longest_side

# So many values of every weight tell two SAMs apart, and take a few milliseconds for ViT-H.
FINGERPRINT_VALUES = 1024


class _SingleMask(SamPredictor):
    """A predictor that gives the generator one mask per point."""

    def predict_torch(self, *args, multimask_output: bool = True, **kwargs):
        return super().predict_torch(*args, multimask_output=False, **kwargs)


def make_generator(sam: Sam, config: ProposalConfig) -> Callable[[np.ndarray], Found]:
    """A function uint8 (H, W, 3) RGB -> Found, on the device of ``sam``.

    Half-precision weights are copied to float32 first: segment-anything prompts with float32
    coordinates.
    """
    if next(sam.parameters()).dtype != torch.float32:
        sam = copy.deepcopy(sam).float()
    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_side=config.points_per_side,
        pred_iou_thresh=config.predicted_iou,
        stability_score_thresh=config.stability,
        box_nms_thresh=config.nms,
    )
    if not config.multimask:
        generator.predictor = _SingleMask(sam)

    def find(image: np.ndarray) -> Found:
        if max(image.shape[:2]) > config.long_side:
            image = resize_longest_side(image, config.long_side)
        rows = generator.generate(image)
        masks = encode_counts(np.stack([row["segmentation"] for row in rows])) if rows else []
        quality = [round(row["predicted_iou"] * row["stability_score"], 4) for row in rows]
        return Found(image.shape[:2], masks, [int(row["area"]) for row in rows], quality)

    return find


def proposals_fingerprint(sam: Sam, config: ProposalConfig) -> str:
    """16 hex digits that name settings and weights; weights are rounded to bfloat16, so storing a
    model in half precision and loading it again does not change the name."""
    digest = hashlib.blake2b(json.dumps(asdict(config), sort_keys=True).encode(), digest_size=8)
    for name, weight in sorted(sam.state_dict().items()):
        start = weight.flatten()[:FINGERPRINT_VALUES].float().cpu().bfloat16()
        digest.update(
            f"{name} {tuple(weight.shape)}".encode() + start.view(torch.int16).numpy().tobytes()
        )
    return digest.hexdigest()


def proposal_source(
    segmenting: SegmentingChain, config: SelectorConfig, folder: str | Path | None, generate: bool
) -> ProposalSource:
    """Where ``collate`` gets the proposals that a selector chooses from.

    ``folder``: of the store, None for none. ``generate``: compute what the store lacks, with the
    SAM of ``segmenting``, which is copied at the first image where its weights are half precision.
    """
    settings = ProposalConfig(**config.proposals)
    store = None
    if folder is not None:
        store = ProposalStore(folder, proposals_fingerprint(segmenting.proposer, settings))

    generators: list[Callable[[np.ndarray], Found]] = []

    def compute(image: np.ndarray) -> Found:
        if not generators:  # It may copy SAM, so it is made for the first image.
            generators.append(make_generator(segmenting.proposer, settings))
        return generators[0](image)

    return ProposalSource(
        config.ranking, config.count, config.pool_size, store, compute if generate else None
    )

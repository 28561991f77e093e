"""LLM-Seg's mask branch: SAM proposes masks, the token of the language model selects among them.

    picture ─► frozen features ─► mean under every proposal ─┐
    h of [SEG] ─► text_projection ───────────────────────────┴► two-way blocks ─► similarity with [SEG]   (which proposal)
                                                                               └► IoP, share inside the target (which to unite)

Where the chain of segmenting makes masks, too (``chain``), the last one of a target stands among
its proposals, behind the others.

n targets of the batch · K proposals of an image, padded to the most in the batch · C width · B
images · G side of the feature grid · P side of the pooling weights · (h, w) the frame of the
proposals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from dataset.proposals import Proposals, union
from model.config import SelectorConfig
from model.selecting.targets import iop_loss, similarity_loss

# DINOv2's, of pixels in 0…1
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Scores:
    """What the heads say of every proposal. ``present`` bool (n, K): False where a row has fewer
    than K proposals. With a chain there is one column more, the last: its mask."""

    similarity: Tensor
    """float32 (n, K): cosine with the [SEG] embedding, -1…1."""
    iop: Tensor
    """float32 (n, K): expected share of the proposal inside the target, 0…1."""
    present: Tensor


class Attention(nn.Module):
    """Multi-head attention with its residual and LayerNorm: x ← LN(x + A(x, y))."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, y: Tensor, padding: Tensor | None = None) -> Tensor:
        """x (n, q, C), y (n, k, C), padding bool (n, k) -> (n, q, C)."""
        update, _ = self.attention(x, y, y, key_padding_mask=padding, need_weights=False)
        return self.norm(x + update)


class TwoWayBlock(nn.Module):
    """Proposals look at each other and at the text, then the text looks at the proposals."""

    def __init__(self, width: int, heads: int, mlp_dim: int):
        super().__init__()
        self.among = Attention(width, heads)
        self.to_text = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_dim), nn.ReLU(), nn.Linear(mlp_dim, width))
        self.norm = nn.LayerNorm(width)
        self.to_proposals = Attention(width, heads)

    def forward(self, proposals: Tensor, text: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """proposals (n, K, C), text (n, 1, C), padding bool (n, K) -> both, changed."""
        proposals = self.to_text(self.among(proposals, proposals, padding), text)
        proposals = self.norm(proposals + self.mlp(proposals))
        return proposals, self.to_proposals(text, proposals, padding)


class Selector(nn.Module):
    """Scores every proposal for every target of a batch in one pass."""

    def __init__(self, config: SelectorConfig, width: int):
        """``width``: C, that of the projected token and of SAM's embedding. Raises ValueError if
        the heads do not divide it."""
        super().__init__()
        if width % config.heads:
            raise ValueError(f"selector.heads {config.heads} does not divide the width {width}")
        self.config = config
        self.encoder = (
            Dinov2Model(Dinov2Config(**(config.dinov2 or {})))
            if config.features == "dinov2"
            else None
        )
        channels = width if self.encoder is None else self.encoder.config.hidden_size
        self.project = nn.Linear(channels + width * config.place, width)
        self.blocks = nn.ModuleList(
            TwoWayBlock(width, config.heads, config.mlp_dim) for _ in range(config.blocks)
        )
        self.final = Attention(width, config.heads)
        self.iou_head = nn.Sequential(
            nn.Linear(width, config.iou_hidden), nn.ReLU(), nn.Linear(config.iou_hidden, width)
        )
        self.iop_head = nn.Sequential(
            nn.Linear(width, config.iop_hidden), nn.ReLU(), nn.Linear(config.iop_hidden, 1)
        )

    def trained(self) -> list[nn.Parameter]:
        """Everything but the frozen encoder."""
        return [p for name, p in self.named_parameters() if not name.startswith("encoder.")]

    def train(self, mode: bool = True) -> Selector:
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """DINOv2's features of its padded input (B, 3, S, S), normalised with ImageNet's numbers:
        (B, c, G, G)."""
        tokens = self.encoder(pixel_values=pixels).last_hidden_state[:, 1:]
        side = round(tokens.shape[1] ** 0.5)
        return tokens.transpose(1, 2).unflatten(2, (side, side))

    def forward(
        self,
        text: Tensor,
        features: Tensor,
        proposals: list[Proposals],
        image_index: Tensor,
        position: Tensor,
        own: Tensor | None = None,
    ) -> Scores:
        """text (n, C), features (B, c, G, G), B × Proposals, image_index int64 (n,), position (1,
        C, H, W) -> Scores.

        ``position`` is SAM's positional encoding over the same frame, of any resolution; used with
        ``config.place`` only. ``own``: pooling weights (n, P, P) of one more proposal of each
        target, None for none.
        """
        weights, present = stack(proposals)
        if self.config.place:
            position = F.interpolate(
                position, features.shape[-2:], mode="bilinear", align_corners=False
            )
            features = torch.cat(
                [features, position.to(features).expand(len(features), -1, -1, -1)], dim=1
            )
        vectors = self.project(pool(features, weights).to(text.dtype))[image_index]  # (n, K, C)
        present = present[image_index]
        if own is not None:
            vector = self.project(pool_own(features, own, image_index).to(text.dtype))
            vectors, present = (
                torch.cat([vectors, vector[:, None]], dim=1),
                F.pad(present, (0, 1), value=True),
            )
        padding = ~present
        # a row without proposals: attention needs a key; nobody reads the result
        padding[:, 0] &= present.any(1)
        query = text[:, None]
        for block in self.blocks:
            vectors, query = block(vectors, query, padding)
        vectors = self.final(vectors, query)
        similarity = F.cosine_similarity(
            self.iou_head(vectors).float(), text[:, None].float(), dim=-1
        )
        return Scores(similarity, self.iop_head(vectors)[..., 0].float().sigmoid(), present)

    def stand_in(self, text: Tensor, image_index: Tensor, position: Tensor) -> Scores:
        """Scores of a proposal and an image that are not there, for a text (1, C) that means
        nothing."""
        channels, side = (
            self.project.in_features - text.shape[-1] * self.config.place,
            self.config.pool_size,
        )
        features, weights = (
            text.new_zeros((1, channels, 1, 1)),
            torch.ones((1, side, side), device=text.device),
        )
        own = weights if self.config.chain else None
        return self(text, features, [Proposals((1, 1), [{}], weights)], image_index, position, own)

    def choose(self, scores: Scores) -> Tensor:
        """bool (n, K): what ``config.rule`` unites. A row without proposals chooses nothing."""
        similarity = scores.similarity.masked_fill(~scores.present, -2.0)
        inside = (scores.iop > self.config.threshold) & scores.present
        if self.config.rule == "iop":
            return inside
        if self.config.rule == "verified":
            return verified(scores, inside)
        count = min(5 if self.config.rule == "top5+iop" else 1, similarity.shape[1])
        best = (
            torch.zeros_like(inside).scatter_(1, similarity.topk(count).indices, True)
            & scores.present
        )
        if self.config.rule == "similarity":
            return best
        return best & inside if self.config.rule == "top5+iop" else best | inside

    def losses(self, scores: Scores, iou: Tensor, iop: Tensor) -> dict[str, Tensor]:
        """Means over targets; iou, iop float (n, K): the truth. A target whose image has no
        proposals adds 0."""
        count = max(len(iou), 1)
        similarity = similarity_loss(
            scores.similarity, iou, scores.present, self.config.temperature
        )
        inside = iop_loss(scores.iop, iop, scores.present)
        return {
            "similarity": similarity.sum() / count,
            "iop": self.config.iop_scale * inside.sum() / count,
        }


# ----------------------------------------------------------------------------------- pure functions


def required(proposals: list[Proposals] | None) -> list[Proposals]:
    """Raises ValueError where a batch has none because its processor had no source of them."""
    if proposals is None:
        raise ValueError(
            "the batch has no proposals; set `processor.proposals = model.proposal_source(folder)`"
            " before collate"
        )
    return proposals


def stack(proposals: list[Proposals]) -> tuple[Tensor, Tensor]:
    """B × Proposals -> pooling weights (B, K, P, P), zero where an image has fewer than K, and
    present bool (B, K). K ≥ 1."""
    weights = nn.utils.rnn.pad_sequence([p.weights for p in proposals], batch_first=True)
    counts = torch.tensor([len(p) for p in proposals], device=weights.device)
    if weights.shape[1] == 0:
        weights = weights.new_zeros((len(proposals), 1, *weights.shape[2:]))
    return weights, torch.arange(weights.shape[1], device=weights.device) < counts[:, None]


def pool(features: Tensor, weights: Tensor) -> Tensor:
    """Mean of the features under every proposal: (B, c, G, G), weights (B, K, P, P) -> float32 (B,
    K, c).

    The same as resizing the features bilinearly to P × P and averaging there, but the weights go
    down to the grid instead of the features up, by the transpose of that resizing: c maps of P²
    values are never made. A 1×1 convolution commutes with the mean, so it comes afterwards. A
    proposal without weight has a zero vector.
    """
    features, side = features.float(), features.shape[-1]
    unit = torch.eye(side, device=features.device)[None]
    resize = F.interpolate(unit, weights.shape[-1], mode="linear", align_corners=False)[0]  # (G, P)
    grid = resize @ weights @ resize.T  # (B, K, G, G)
    mass = grid.sum((2, 3))
    return torch.einsum("bkgh,bcgh->bkc", grid, features) / mass.clamp(min=1e-6)[..., None]


def pool_own(features: Tensor, weights: Tensor, image_index: Tensor) -> Tensor:
    """``pool`` for one proposal of each target: (B, c, G, G), weights (n, P, P), image_index int64
    (n,) -> float32 (n, c).

    Image by image: features of every target, 16 MB each with DINOv2's, are never made.
    """
    out = weights.new_zeros((len(weights), features.shape[1]))
    for image in image_index.unique().tolist():
        rows = image_index == image
        out[rows] = pool(features[image : image + 1], weights[rows][None])[0]
    return out


def verified(scores: Scores, inside: Tensor) -> Tensor:
    """bool (n, K): the last column, the chain's mask; where the IoP of another is higher, what is
    ``inside`` of the others."""
    own, others = torch.zeros_like(inside), inside.clone()
    own[:, -1], others[:, -1] = True, False
    surer = (scores.iop.masked_fill(~scores.present, -1.0) > scores.iop[:, -1:]).any(
        1
    ) & others.any(1)
    return torch.where(surer[:, None], others, own)


def dinov2_pixels(
    sam_pixels: Tensor, resized: list[tuple[int, int]], size: int, mean: Tensor, std: Tensor
) -> Tensor:
    """SAM's padded input (B, 3, S, S) as DINOv2's, (B, 3, size, size): the same padded frame, 0 in
    the padding.

    ``resized``: B × (height, width) of the image inside; ``mean`` and ``std`` (3, 1, 1): SAM's, of
    pixels in 0…255.
    """
    ours, theirs = (
        torch.tensor(v, device=sam_pixels.device)[:, None, None]
        for v in (IMAGENET_MEAN, IMAGENET_STD)
    )
    pixels = ((sam_pixels.float() * std.float() + mean.float()) / 255 - ours) / theirs
    for image, (height, width) in zip(pixels, resized, strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return F.interpolate(
        pixels, (size, size), mode="bilinear", align_corners=False, antialias=True
    ).to(sam_pixels.dtype)


def united(chosen: Tensor, proposals: Proposals, original: tuple[int, int]) -> Tensor:
    """chosen bool (T, K) -> bool (T, 1, H, W) in the original frame: the union of the chosen
    proposals of one image."""
    picked = [
        [m for m, keep in zip(proposals.masks, row[: len(proposals)], strict=True) if keep]
        for row in chosen.tolist()
    ]
    masks = np.array([union(row, proposals.size) for row in picked], dtype=bool).reshape(
        -1, 1, *proposals.size
    )
    masks = torch.from_numpy(masks)
    if tuple(proposals.size) != tuple(original) and len(masks):
        masks = F.interpolate(masks.float(), original, mode="bilinear", align_corners=False) > 0.5
    return masks.reshape(-1, 1, *original).to(chosen.device)

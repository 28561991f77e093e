"""LLM-Seg's mask branch: SAM proposes masks, the token of the language model selects among them.

    picture ─► frozen features ─► mean under every proposal ─┐
    h of [SEG] ─► text_projection ───────────────────────────┴► two-way blocks ─┬► similarity
                                                                                └► IoP

The similarity with [SEG] says which proposal is the target, the IoP (the share of a proposal inside
the target) which proposals to unite. Where the chain of segmenting makes masks, too (``chain``),
the last mask of a target stands among its proposals, behind the others.

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

from cores.dataset.proposals import Proposals, union
from cores.model.config import SelectorConfig
from cores.model.selecting.targets import iop_loss, similarity_loss


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
        self.encoder: Dinov2Model | None = None
        if config.features == "dinov2":
            self.encoder = Dinov2Model(Dinov2Config(**(config.dinov2 or {})))
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
    def encode(self, sam_pixels: Tensor) -> Tensor:
        """DINOv2's features (B, c, G, G) of SAM's padded input (B, 3, S, S).

        Both models normalise with ImageNet's mean and deviation, SAM in 0…255 and DINOv2 in 0…1,
        and both pad with 0 after that, so resizing is all that is needed.
        """
        assert self.encoder is not None, "only a selector with features dinov2 has an encoder"
        side = self.config.feature_size
        pixels = F.interpolate(
            sam_pixels.float(), (side, side), mode="bilinear", align_corners=False, antialias=True
        )
        tokens = self.encoder(pixel_values=pixels.to(sam_pixels.dtype)).last_hidden_state[:, 1:]
        side = round(tokens.shape[1] ** 0.5)
        return tokens.transpose(1, 2).unflatten(2, (side, side))

    def forward(
        self,
        text: Tensor,
        features: Tensor,
        proposals: list[Proposals],
        image_index: Tensor,
        position: Tensor,
        chain_weights: Tensor | None = None,
    ) -> Scores:
        """text (n, C), features (B, c, G, G), B × Proposals, image_index int64 (n,), position (1,
        C, H, W) -> Scores.

        ``position`` is SAM's positional encoding over the same frame, of any resolution; used with
        ``config.place`` only. ``chain_weights``: pooling weights (n, P, P) of the chain's mask of
        each target, which is one more proposal; None without a chain.
        """
        weights, present = stack(proposals)
        if self.config.place:
            size = features.shape[-2:]
            position = F.interpolate(position, size, mode="bilinear", align_corners=False)
            position = position.to(features).expand(len(features), -1, -1, -1)
            features = torch.cat([features, position], dim=1)
        vectors = self.project(pool(features, weights).to(text.dtype))[image_index]  # (n, K, C)
        present = present[image_index]
        if chain_weights is not None:
            pooled = pool_per_target(features, chain_weights, image_index)
            vectors = torch.cat([vectors, self.project(pooled.to(text.dtype))[:, None]], dim=1)
            present = F.pad(present, (0, 1), value=True)
        padding = ~present
        # Attention needs a key: a row without proposals keeps its first. Nobody reads the result.
        padding[:, 0] &= present.any(1)
        query = text[:, None]
        for block in self.blocks:
            vectors, query = block(vectors, query, padding)
        vectors = self.final(vectors, query)
        found, wanted = self.iou_head(vectors).float(), text[:, None].float()
        similarity = F.cosine_similarity(found, wanted, dim=-1)
        return Scores(similarity, self.iop_head(vectors)[..., 0].float().sigmoid(), present)

    def stand_in(self, text: Tensor, image_index: Tensor, position: Tensor) -> Scores:
        """Scores of a blank proposal in a blank image for any text (1, C): a pass through all
        weights for a batch without targets."""
        channels = self.project.in_features - text.shape[-1] * self.config.place
        side = self.config.pool_size
        weights = torch.ones((1, side, side), device=text.device)
        proposals = [Proposals((1, 1), [{}], weights)]
        chain_weights = weights if self.config.chain else None
        features = text.new_zeros((1, channels, 1, 1))
        return self(text, features, proposals, image_index, position, chain_weights)

    def choose(self, scores: Scores) -> Tensor:
        """bool (n, K): what ``config.rule`` unites. A row without proposals chooses nothing."""
        similarity = scores.similarity.masked_fill(~scores.present, -2.0)
        inside = (scores.iop > self.config.threshold) & scores.present
        if self.config.rule == "iop":
            return inside
        if self.config.rule == "verified":
            return verified(scores, inside)
        count = min(5 if self.config.rule == "top5+iop" else 1, similarity.shape[1])
        best = torch.zeros_like(inside).scatter_(1, similarity.topk(count).indices, True)
        best &= scores.present
        if self.config.rule == "similarity":
            return best
        return best & inside if self.config.rule == "top5+iop" else best | inside

    def losses(self, scores: Scores, iou: Tensor, iop: Tensor) -> dict[str, Tensor]:
        """Means over targets; iou, iop float (n, K): the ground truth. A target whose image has no
        proposals adds 0."""
        c, count = self.config, max(len(iou), 1)
        similarity = similarity_loss(scores.similarity, iou, scores.present, c.temperature)
        inside = iop_loss(scores.iop, iop, scores.present)
        return {"similarity": similarity.sum() / count, "iop": c.iop_scale * inside.sum() / count}


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
    K, c). A proposal without weight has a zero vector.

    This equals resizing the features bilinearly to P × P and averaging there, but the weights go
    down to the grid by the transpose of that resizing, so that c maps of P² values are never made.
    A 1×1 convolution commutes with the mean and comes afterwards, for the same reason.
    """
    features, side = features.float(), features.shape[-1]
    unit = torch.eye(side, device=features.device)[None]
    resize = F.interpolate(unit, weights.shape[-1], mode="linear", align_corners=False)[0]  # (G, P)
    grid = resize @ weights @ resize.T  # (B, K, G, G)
    mass = grid.sum((2, 3))
    return torch.einsum("bkgh,bcgh->bkc", grid, features) / mass.clamp(min=1e-6)[..., None]


def pool_per_target(features: Tensor, weights: Tensor, image_index: Tensor) -> Tensor:
    """``pool`` for one proposal of each target: (B, c, G, G), weights (n, P, P), image_index int64
    (n,) -> float32 (n, c).

    It goes image by image, because the features of every target would be 16 MB each with DINOv2's.
    """
    out = weights.new_zeros((len(weights), features.shape[1]))
    for image in image_index.unique().tolist():
        rows = image_index == image
        out[rows] = pool(features[image : image + 1], weights[rows][None])[0]
    return out


def verified(scores: Scores, inside: Tensor) -> Tensor:
    """bool (n, K): the chain's mask, which is the last column, or the other proposals that are
    ``inside`` the target where one of them has a higher IoP."""
    chain, others = torch.zeros_like(inside), inside.clone()
    chain[:, -1], others[:, -1] = True, False
    iop = scores.iop.masked_fill(~scores.present, -1.0)
    better = (iop > scores.iop[:, -1:]).any(1) & others.any(1)
    return torch.where(better[:, None], others, chain)


def united(chosen: Tensor, proposals: Proposals, original: tuple[int, int]) -> Tensor:
    """chosen bool (T, K) -> bool (T, 1, H, W) in the original frame: the union of the chosen
    proposals of one image. A column behind the proposals, the chain's mask, is not looked at."""
    stacked = np.zeros((len(chosen), 1, *proposals.size), dtype=bool)
    for mask, row in zip(stacked, chosen[:, : len(proposals)].tolist(), strict=True):
        mask[0] = union(
            [m for m, picked in zip(proposals.masks, row, strict=True) if picked], proposals.size
        )
    masks = torch.from_numpy(stacked).to(chosen.device)
    if tuple(proposals.size) != tuple(original) and len(masks):
        masks = F.interpolate(masks.float(), original, mode="bilinear", align_corners=False) > 0.5
    return masks.reshape(-1, 1, *original)

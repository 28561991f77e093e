"""The connection between the two chains: hidden states of the language model become prompts of
SAM's mask decoder.
"""

from __future__ import annotations

from torch import nn


class TextProjection(nn.Sequential):
    """Hidden state (…, d) -> prompt token (…, C): LISA's Linear, ReLU, Linear, then an optional
    LayerNorm whose output has about the norm ``norm``."""

    def __init__(self, hidden: int, width: int, norm: float | None):
        linear, project = nn.Linear(hidden, hidden), nn.Linear(hidden, width)
        super().__init__(linear, nn.ReLU(inplace=True), project)
        if norm is not None:
            layer_norm = nn.LayerNorm(width)
            nn.init.constant_(layer_norm.weight, norm / width**0.5)  # Before it, the norm is √C.
            self.append(layer_norm)

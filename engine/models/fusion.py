"""Spatial Fusion: one vector an image from its global and local tokens (paper 3.2)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspg.kernels.precision import at_least_fp32, no_autocast

Fusion = Literal["gate_after_norm", "gate_before_norm", "ungated", "global"]


class SpatialFusion(nn.Module):
    """Weighted sum over positions of an image's normalised tokens: 3 parameters.

    Gate g = sigmoid(conv(mean_D X) + conv(max_D X)), one convolution over positions for both. By `fusion`:

    - gate_after_norm: Σ_s g_s·x̂_s.
    - gate_before_norm: Σ_s (g_s·x_s)/‖g_s·x_s‖, the published order (and eqs. 1 and 6 to the letter): the gate cancels,
      and its gradient is zero but for rounding.
    - ungated: Σ_s x̂_s. global: x̂_0 alone. The convolution does not train.

    Because logits are summed over positions, this one vector is all that they need of an image.
    """

    def __init__(self, fusion: Fusion = "gate_after_norm") -> None:
        super().__init__()
        self.fusion = fusion
        self.conv = nn.Conv1d(1, 1, kernel_size=3, padding=1, bias=False)
        self.conv.weight.requires_grad_(fusion.startswith("gate"))

    def gate(self, tokens: Tensor) -> Tensor:
        """Gate (B,S) in (0,1) of tokens (B,S,D)."""
        means, maxima = tokens.mean(dim=-1), tokens.max(dim=-1).values
        return torch.sigmoid(self.conv(means[:, None]) + self.conv(maxima[:, None]))[:, 0]

    def forward(self, tokens: Tensor) -> Tensor:
        """Image vectors (B,D) of tokens (B,S,D), token 0 global; float32 or better."""
        with no_autocast(tokens):
            tokens = at_least_fp32(tokens)
            if self.fusion == "global":
                return F.normalize(tokens[:, 0], dim=-1)
            if self.fusion == "ungated":
                return F.normalize(tokens, dim=-1).sum(dim=1)
            gate = self.gate(tokens)[..., None]
            if self.fusion == "gate_before_norm":
                return F.normalize(gate * tokens, dim=-1).sum(dim=1)
            return (gate * F.normalize(tokens, dim=-1)).sum(dim=1)

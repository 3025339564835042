"""Spatial Fusion: one vector an image from its global and local tokens (paper 3.2)."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspg.kernels.precision import at_least_fp32, no_autocast
from pspg.kernels.similarity import similarity_logits

from ._base import Fusion


class SpatialFusion(Fusion):
    """Sum over positions of an image's normalised tokens: 3 parameters.

    Logits are summed over positions, so this one vector is all that they need of an image.
    """

    trains_gate: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel_size=3, padding=1, bias=False)
        self.conv.weight.requires_grad_(self.trains_gate)

    def gate(self, tokens: Tensor) -> Tensor:
        """Gate (B,S) in (0,1) of tokens (B,S,D): sigmoid(conv(mean_D X) + conv(max_D X)), one convolution for both.

        It is linear, so it runs once; and as a product, since cuDNN's gradient of a weight may vary from run to run.
        """
        rows = F.pad(tokens.mean(dim=-1) + tokens.max(dim=-1).values, (1, 1))
        return torch.sigmoid(rows.unfold(-1, 3, 1) @ self.conv.weight.flatten())

    @abstractmethod
    def fuse(self, tokens: Tensor) -> Tensor:
        """Image vectors (B,D) of tokens (B,S,D) in float32 or better."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Image vectors (B,D) of tokens (B,S,D), token 0 global; float32 or better."""
        with no_autocast(tokens):
            return self.fuse(at_least_fp32(tokens))

    def class_logits(
        self, logit_scale: Tensor, tokens: Tensor, positive: Tensor, negative: Tensor
    ) -> tuple[Tensor, Tensor]:
        vectors = self(tokens)
        logits = similarity_logits(vectors, torch.cat([positive, negative]), logit_scale, unit=True)
        return logits.unflatten(1, (2, -1)), vectors

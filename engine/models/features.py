"""Features of the frozen image tower for a batch of pixels, or those that the batch brings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..data.batch import Batch
from .clip import ImageFeatures


class ImageEncoder(Protocol):
    """A model with a frozen image tower."""

    def image_features(self, images: Tensor) -> ImageFeatures:
        """Features of images (B,3,h,w), without gradients."""


@dataclass(frozen=True)
class FeatureBatch:
    """B images whose frozen features are already known."""

    ids: list[str]
    features: ImageFeatures
    labels: Tensor | None
    """float32 (B,C) in {1, 0, -1}, -1 masked"""
    index: Tensor
    """int64 (B,): rows of the data set"""

    @property
    def place(self) -> int:
        """The first row of the data set in it."""
        return int(self.index[0])


@torch.no_grad()
def frozen_features(
    model: ImageEncoder, batch: Batch | FeatureBatch, device: torch.device, autocast: torch.dtype | None
) -> ImageFeatures:
    """Image features of a batch: the cached ones it brings, or those of the frozen tower."""
    if isinstance(batch, FeatureBatch):
        return ImageFeatures(*(tensor.to(device, non_blocking=True) for tensor in batch.features))
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        return model.image_features(batch.to(device, non_blocking=True).images)

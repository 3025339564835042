"""A batch of images with their labels and tokens, as loaders give it to training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from .images import normalize


@dataclass
class Batch:
    """B samples. Pixels stay 8-bit grey until `images` is asked for: 12 times less to move between processes
    and devices, so move the batch first (`batch.to(device).images`)."""

    ids: list[str]
    index: Tensor
    """int64 (B,): rows of the manifest"""
    pixels: Tensor
    """uint8 (B,h,w)"""
    labels: Tensor | None
    """float32 (B,C) in {1, 0, -1}, -1 masked"""
    tokens: Tensor | None
    """int64 (B,77)"""
    mean: float
    std: float
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(id, reason) of the samples left out since the last batch"""
    dummy: bool = False
    """its one image belongs to another batch: none of this batch's own could be read"""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def place(self) -> int:
        """The first row of the manifest in it: sorts the batches of all ranks into the order of the data set."""
        return int(self.index[0])

    @cached_property
    def images(self) -> Tensor:
        """float32 (B,3,h,w), normalised with mean and std."""
        return normalize(self.pixels, self.mean, self.std)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (DataLoader calls this)."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            index=function(self.index),
            pixels=function(self.pixels),
            labels=None if self.labels is None else function(self.labels),
            tokens=None if self.tokens is None else function(self.tokens),
        )

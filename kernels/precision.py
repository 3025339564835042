"""Normalisation, similarity, pooling and losses run in fp32 or better: pair logits reach ±700."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor, in float32 where it was of a shorter type."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Context in which autocast leaves the tensor's device alone."""
    return torch.autocast(tensor.device.type, enabled=False)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype that matrix products are asked for: autocast's where it is on, else the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype

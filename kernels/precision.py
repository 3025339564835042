"""Normalisation, similarity, pooling and losses run in fp32 or better: pair logits reach ±700."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor, in float32 where it was of a shorter type."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which autocast leaves the tensor's device alone."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype of matrix products: autocast's where it is on (it leaves float64 alone), else the tensor's own."""
    device = tensor.device.type
    available = tensor.dtype != torch.float64 and torch.amp.is_autocast_available(device)
    return torch.get_autocast_dtype(device) if available and torch.is_autocast_enabled(device) else tensor.dtype

"""Batch norm (Ioffe and Szegedy 2015, algorithm 1) in training, a residual (He et al. 2016) and ReLU, literally."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import at_least_fp32, no_autocast
from .norm import Norm


def batch_norm(x: Tensor, norm: Norm, residual: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    """Arguments and results as `op.batch_norm_twice`; rounded once, to x's dtype."""
    with no_autocast(x):
        value, dims = at_least_fp32(x), (0, 2, 3)
        mean = value.mean(dims)
        variance = (value - _channels(mean)).square().mean(dims)
        normal = (value - _channels(mean)) / (_channels(variance) + norm.eps).sqrt()
        y = normal * _channels(norm.weight) + _channels(norm.bias)
        if residual is not None:
            y = y + residual
        y = torch.relu(y) if relu else y
        rows = x.numel() // x.shape[1]
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_((variance * (rows / (rows - 1))).to(norm.running_var.dtype), norm.momentum)
            norm.num_batches_tracked.add_(1)
        y = y.to(x.dtype)
        return y, y


def _channels(values: Tensor) -> Tensor:
    return at_least_fp32(values)[:, None, None]

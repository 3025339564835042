"""Batch norm, residual and ReLU as torch's operators: what the modules of a ResNet call, bit for bit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import Norm


def batch_norm(x: Tensor, norm: Norm, residual: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    """Arguments and results as `op.batch_norm_twice`; rounded behind the norm, and again behind the addition."""
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
    statistics, weights = (norm.running_mean, norm.running_var), (norm.weight, norm.bias)
    y = F.batch_norm(x, *statistics, *weights, training=True, momentum=norm.momentum, eps=norm.eps)
    if residual is not None:
        y += residual
    y = F.relu_(y) if relu else y
    return y, y

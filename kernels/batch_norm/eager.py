"""Batch norm, residual and ReLU as torch's operators: what the modules of a ResNet call, bit for bit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .running import Running


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Running,
    residual: Tensor | None,
    *,
    relu: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as `op.batch_norm_twice`; rounded behind the norm, and again behind the addition."""
    with torch.no_grad():
        running.batches.add_(1)
    y = F.batch_norm(x, running.mean, running.variance, weight, bias, training=True, momentum=momentum, eps=eps)
    if residual is not None:
        y += residual
    y = F.relu_(y) if relu else y
    return y, y

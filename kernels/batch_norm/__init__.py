"""Batch norm in training with the residual and the ReLU that follow it."""

from .norm import Norm
from .op import batch_norm, batch_norm_twice

__all__ = ["Norm", "batch_norm", "batch_norm_twice"]

"""Batch norm in training with the residual and the ReLU that follow it."""

from .op import batch_norm, batch_norm_twice
from .running import Running

__all__ = ["Running", "batch_norm", "batch_norm_twice"]

"""Batch norm, residual and ReLU as Triton kernels: rows B·H·W by channels, which is channels last as it lies."""

from .operators import batch_norm

__all__ = ["batch_norm"]

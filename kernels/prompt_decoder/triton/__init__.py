"""The steps of the GRU prompt decoder as Triton kernels."""

from .host import decode

__all__ = ["decode"]

"""Speed and memory of operators, steps and loaders, behind a correctness gate."""

import pspg.engine  # noqa: F401  what it sets for the allocator and for waiting threads is read when torch is loaded

from .jobs import bench

__all__ = ["bench"]

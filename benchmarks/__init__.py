"""Speed and memory of operators, steps and loaders, behind a correctness gate."""

from .jobs import bench

__all__ = ["bench"]

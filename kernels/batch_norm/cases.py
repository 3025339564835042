"""Batch norms of a RN50 at production shapes: the stem's, and a bottleneck's of the first and of the last stage."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..cases import B, Case, empty
from .triton.backward import run_backward
from .triton.forward import run_normalise, run_statistics


class Shape(NamedTuple):
    """Of a batch norm's input, B images."""

    channels: int
    side: int
    """pixels"""
    residual: bool = False
    relu: bool = True


SHAPES = (Shape(32, 112), Shape(256, 56, residual=True), Shape(256, 56, relu=False), Shape(2048, 7, residual=True))


def _run(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        channels = shape.channels
        x = empty(B, channels, shape.side, shape.side, dtype=dtype).to(memory_format=torch.channels_last)
        weight, bias, mean, variance = (empty(channels) for _ in range(4))
        statistics = run_statistics(x, mean, variance, empty(dtype=torch.int64), 0.1, 1e-5)
        y = run_normalise(x, x if shape.residual else None, weight, bias, statistics, shape.relu)
        result = y if shape.residual else None  # that a second reader has
        run_backward(y, result, x, result, weight, bias, statistics, shape.relu)


_WRITES = {
    "_moments_kernel": ("partial",),
    "_statistics_kernel": ("statistics",),
    "_normalise_kernel": ("y",),
    "_sums_kernel": ("d_residual", "partial"),
    "_add_up_kernel": ("sums",),
    "_gradient_kernel": ("d_x",),
}
CASES = (Case("batch norm", _run, writes=_WRITES),)

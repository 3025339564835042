"""The kernels as operators of torch, with their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..norm import Norm
from .backward import run_backward
from .forward import run_normalise, run_statistics

# The statistics are an operator of their own, which nothing differentiates: backward of the norm goes through them.
_statistics = torch.library.custom_op(
    "pspg::batch_norm_statistics", run_statistics, mutates_args=("running_mean", "running_variance", "batches")
)
_normalise = torch.library.custom_op("pspg::batch_norm", run_normalise, mutates_args=())
_gradients = torch.library.custom_op("pspg::batch_norm_backward", run_backward, mutates_args=())


@_statistics.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty((2, x.shape[1]), dtype=torch.float32)


@_normalise.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@_gradients.register_fake
def _(d_y: Tensor, d_again: Tensor | None, x: Tensor, y: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    d_x, d_residual = (torch.empty_like(x, memory_format=torch.channels_last) for _ in range(2))
    sums = x.new_empty((2, x.shape[1]), dtype=torch.float32)
    return d_x, x.new_empty((0,)) if y is None else d_residual, sums


class _BatchNorm(torch.autograd.Function):
    """The norm for two readers: an operator of torch cannot give the same memory twice."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, statistics: Tensor, relu: bool
    ) -> tuple[Tensor, Tensor]:
        y = _normalise(x, residual, weight, bias, statistics, relu)
        ctx.added, ctx.relu = residual is not None, relu
        ctx.save_for_backward(x, y if ctx.added and relu else None, weight, bias, statistics)
        ctx.set_materialize_grads(False)  # or zeros are written where there is one reader
        return y, y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor | None, d_again: Tensor | None) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, statistics = ctx.saved_tensors
        if d_y is None:
            d_y, d_again = d_again, None
        if d_y is None:
            return (None,) * 6
        if y is None and d_again is not None:
            d_y, d_again = d_y + d_again, None
        d_x, d_residual, sums = _gradients(d_y, d_again, x, y, weight, bias, statistics, ctx.relu)
        d_bias, d_weight = sums
        added = (d_y if y is None else d_residual) if ctx.added else None  # without a ReLU nothing is masked
        return d_x, added, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None, None


def batch_norm(x: Tensor, norm: Norm, residual: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    """Arguments and results as `op.batch_norm_twice`."""
    kept = norm.running_mean, norm.running_var, norm.num_batches_tracked
    statistics = _statistics(x.detach(), *kept, norm.momentum, norm.eps)
    found: tuple[Tensor, Tensor] = _BatchNorm.apply(x, residual, norm.weight, norm.bias, statistics, relu)
    return found

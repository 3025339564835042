"""Batch norm over the images of all ranks."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pspg.kernels.precision import at_least_fp32

from .collectives import all_gather_rows, all_reduce_sum, world_size

M = TypeVar("M", bound=nn.Module)


def convert_sync_batch_norm(module: M, device: torch.device) -> M:
    """`module` with every `BatchNorm2d` replaced by one whose training statistics are those of all ranks together.

    Parameters, buffers and their names stay. torch's own module runs on a GPU only.
    """
    if device.type == "cuda":
        converted: M = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return converted
    for layer in module.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SyncBatchNorm2d
    return module


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over all ranks, on any device; ranks may have different numbers of images, also none."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, variance, count = _Normalise.apply(at_least_fp32(x), self.weight, self.bias, self.eps)
        with torch.no_grad():
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            assert self.running_mean is not None
            assert self.running_var is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return y.to(x.dtype)


class _Normalise(torch.autograd.Function):
    """Statistics of all ranks forward, and the two sums that their gradient needs backward: one collective each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        dims = [0, 2, 3]
        counted = x.new_full((x.shape[1],), x.numel() // x.shape[1])
        own_mean = x.sum(dims) / counted.clamp(min=1)
        own_square = (x - _channels(own_mean)).square().sum(dims)
        own = torch.stack([counted, own_mean, own_square])
        counts, means, squares = all_gather_rows(own[None], [1] * world_size()).unbind(dim=1)
        count = counts.sum(0)
        mean = (counts * means).sum(0) / count
        variance = (squares + counts * (means - mean).square()).sum(0) / count
        inverse = (variance + eps).rsqrt()
        normal = (x - _channels(mean)) * _channels(inverse)
        ctx.save_for_backward(normal, inverse, weight, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return normal * _channels(weight) + _channels(bias), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        normal, inverse, weight, count = ctx.saved_tensors
        own = torch.stack([gradient.sum([0, 2, 3]), (gradient * normal).sum([0, 2, 3])])
        constant, slope = all_reduce_sum(own) / count
        x = _channels(weight * inverse) * (gradient - _channels(constant) - normal * _channels(slope))
        return x, own[1], own[0], None


def _channels(values: Tensor) -> Tensor:
    return values[:, None, None]

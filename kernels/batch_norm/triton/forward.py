"""Mean and deviation of each channel, then the norm, the residual and the ReLU in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import launch
from .tiles import (
    affine,
    channels_last,
    channels_of,
    finish_grid,
    normalised,
    pass_grid,
    rows_of,
    sums_grid,
    tile,
)


@triton.jit
def _moments_kernel(
    x,  # (rows,C)
    partial,  # (2,splits,C) float32: mean of a program's rows, sum of squares about it
    rows,
    channels,
    per_program,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    split = tl.program_id(0)
    column, inside = channels_of(BLOCK_C, channels, 1)
    first = split.to(tl.int64) * per_program
    last = tl.minimum(first + per_program, rows)
    # Sums are about the mean of the first tile: of a channel whose mean is large no digits are lost.
    offsets, mask = tile(first, last, column, inside, channels, BLOCK_R)
    value = tl.load(x + offsets, mask=mask, other=0).to(tl.float32)
    origin = tl.sum(value, 0) / tl.minimum(last - first, BLOCK_R).to(tl.float32)
    apart = tl.where(mask, value - origin[None, :], 0.0)
    total, square = apart, apart * apart
    for start in range(first + BLOCK_R, last, BLOCK_R):
        offsets, mask = tile(start, last, column, inside, channels, BLOCK_R)
        value = tl.load(x + offsets, mask=mask, other=0).to(tl.float32)
        apart = tl.where(mask, value - origin[None, :], 0.0)
        total += apart
        square += apart * apart
    total_of_rows = tl.sum(total, 0)
    shift = total_of_rows / (last - first).to(tl.float32)
    out = partial + split * channels + column
    tl.store(out, origin + shift, mask=inside)
    about_mean = tl.maximum(tl.sum(square, 0) - total_of_rows * shift, 0.0)
    tl.store(out + tl.num_programs(0) * channels, about_mean, mask=inside)


@triton.jit
def _statistics_kernel(
    partial,  # (2,splits,C) float32, as above
    statistics,  # (2,C) float32: mean, reciprocal deviation
    running_mean,  # (C,)
    running_variance,  # (C,)
    batches,  # () int64
    rows,
    channels,
    per_program,
    splits,
    momentum,
    eps,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column, inside = channels_of(BLOCK_C, channels, 0)
    split = tl.arange(0, SPLITS)
    mask = (split < splits)[:, None] & inside[None, :]
    offsets = split[:, None] * channels + column[None, :]
    means = tl.load(partial + offsets, mask=mask, other=0)
    squares = tl.load(partial + splits * channels + offsets, mask=mask, other=0)
    own_rows = tl.maximum(tl.minimum(rows - split.to(tl.int64) * per_program, per_program), 0)
    share = (own_rows.to(tl.float32) / rows)[:, None]
    origin = tl.load(partial + column, mask=inside, other=0)
    mean = origin + tl.sum(tl.where(mask, share * (means - origin[None, :]), 0.0), 0)
    apart = tl.where(mask, means - mean[None, :], 0.0)
    variance = tl.sum(squares / rows + share * apart * apart, 0)
    tl.store(statistics + column, mean, mask=inside)
    tl.store(statistics + channels + column, 1 / tl.sqrt(variance + eps), mask=inside)

    kept = tl.load(running_mean + column, mask=inside, other=0).to(tl.float32)
    kept = kept * (1 - momentum) + mean * momentum
    tl.store(running_mean + column, kept.to(running_mean.dtype.element_ty), mask=inside)
    kept = tl.load(running_variance + column, mask=inside, other=0).to(tl.float32)
    unbiased = variance * (rows / (rows - 1))
    kept = kept * (1 - momentum) + unbiased * momentum
    tl.store(running_variance + column, kept.to(running_variance.dtype.element_ty), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + 1)


@triton.jit
def _normalise_kernel(
    x,  # (rows,C)
    residual,  # (rows,C), or None
    weight,  # (C,)
    bias,  # (C,)
    statistics,  # (2,C) float32
    y,  # (rows,C)
    rows,
    channels,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column, inside = channels_of(BLOCK_C, channels, 1)
    offsets, mask = tile(tl.program_id(0).to(tl.int64) * BLOCK_R, rows, column, inside, channels, BLOCK_R)
    value = tl.load(x + offsets, mask=mask, other=0).to(tl.float32)
    value = affine(normalised(value, statistics, column, inside, channels), weight, bias, column, inside)
    if residual is not None:
        value += tl.load(residual + offsets, mask=mask, other=0).to(tl.float32)
    if RELU:
        value = tl.where(value <= 0, 0.0, value)  # NaN stays
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)


def run_statistics(
    x: Tensor, running_mean: Tensor, running_variance: Tensor, batches: Tensor, momentum: float, eps: float
) -> Tensor:
    """(2,C) float32 mean and reciprocal deviation of x (B,C,H,W); the running statistics change in place."""
    x = rows_of(channels_last(x))
    channels = x.shape[-1]
    rows = x.numel() // channels
    grid, per_program, options = sums_grid("batch_norm_moments", rows, channels, x.device)
    partial = x.new_empty((2, grid[0], channels), dtype=torch.float32)
    launch(_moments_kernel, grid, *(x, partial, rows, channels, per_program), **options)
    statistics = x.new_empty((2, channels), dtype=torch.float32)
    running = running_mean, running_variance, batches
    sizes = rows, channels, per_program, grid[0], momentum, eps
    grid_of_sums, options = finish_grid(channels, grid[0], x.device)
    launch(_statistics_kernel, grid_of_sums, partial, statistics, *running, *sizes, **options)
    return statistics


def run_normalise(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, statistics: Tensor, relu: bool
) -> Tensor:
    """relu(γ x̂ + β + residual) of x (B,C,H,W) with the given statistics, in channels last."""
    x = channels_last(x)
    y = torch.empty_like(x)
    channels = x.shape[1]
    rows = x.numel() // channels
    grid, options = pass_grid(rows, channels, x.device)
    added = None if residual is None else rows_of(channels_last(residual))
    tensors = rows_of(x), added, weight.contiguous(), bias.contiguous(), statistics, rows_of(y)
    launch(_normalise_kernel, grid, *tensors, rows, channels, RELU=relu, **options)
    return y

"""Two sums of each channel over the gradient behind the ReLU, then the gradient by x in one pass."""

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
def _passed(d_y, d_again, y, normal, weight, bias, offsets, mask, column, inside, RELU: tl.constexpr):
    """The gradient where the ReLU let its input pass: by the sign of its result, or of γ x̂ + β made again."""
    gradient = tl.load(d_y + offsets, mask=mask, other=0).to(tl.float32)
    if d_again is not None:
        gradient += tl.load(d_again + offsets, mask=mask, other=0).to(tl.float32)
    if RELU:
        if y is not None:
            result = tl.load(y + offsets, mask=mask, other=0).to(tl.float32)
        else:
            result = affine(normal, weight, bias, column, inside)
        gradient = tl.where(result <= 0, 0.0, gradient)
    return gradient


@triton.jit
def _sums_kernel(
    d_y,  # (rows,C)
    d_again,  # (rows,C), added to it; or None
    x,  # (rows,C)
    y,  # (rows,C), or None: made again
    weight,  # (C,)
    bias,  # (C,)
    statistics,  # (2,C) float32
    d_residual,  # (rows,C): the gradient behind the ReLU; or None
    partial,  # (2,splits,C) float32: sums of it, and of it times x̂
    rows,
    channels,
    per_program,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    split = tl.program_id(0)
    column, inside = channels_of(BLOCK_C, channels, 1)
    first = split.to(tl.int64) * per_program
    last = tl.minimum(first + per_program, rows)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    along = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_R):
        offsets, mask = tile(start, last, column, inside, channels, BLOCK_R)
        value = tl.load(x + offsets, mask=mask, other=0).to(tl.float32)
        normal = normalised(value, statistics, column, inside, channels)
        gradient = _passed(d_y, d_again, y, normal, weight, bias, offsets, mask, column, inside, RELU)
        if d_residual is not None:
            # The sums are those of what is stored, which the pass behind them reads.
            stored = gradient.to(d_residual.dtype.element_ty)
            tl.store(d_residual + offsets, stored, mask=mask)
            gradient = stored.to(tl.float32)
        total += gradient
        along += gradient * normal
    out = partial + split * channels + column
    tl.store(out, tl.sum(total, 0), mask=inside)
    tl.store(out + tl.num_programs(0) * channels, tl.sum(along, 0), mask=inside)


@triton.jit
def _add_up_kernel(
    partial,  # (2,splits,C) float32
    sums,  # (2,C) float32
    channels,
    splits,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column, inside = channels_of(BLOCK_C, channels, 0)
    split = tl.arange(0, SPLITS)
    mask = (split < splits)[:, None] & inside[None, :]
    offsets = split[:, None] * channels + column[None, :]
    tl.store(sums + column, tl.sum(tl.load(partial + offsets, mask=mask, other=0), 0), mask=inside)
    along = tl.load(partial + splits * channels + offsets, mask=mask, other=0)
    tl.store(sums + channels + column, tl.sum(along, 0), mask=inside)


@triton.jit
def _gradient_kernel(
    d,  # (rows,C): d_y; without RELU the gradient behind it
    x,  # (rows,C)
    weight,  # (C,)
    bias,  # (C,)
    statistics,  # (2,C) float32
    sums,  # (2,C) float32
    d_x,  # (rows,C)
    rows,
    channels,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column, inside = channels_of(BLOCK_C, channels, 1)
    offsets, mask = tile(tl.program_id(0).to(tl.int64) * BLOCK_R, rows, column, inside, channels, BLOCK_R)
    value = tl.load(x + offsets, mask=mask, other=0).to(tl.float32)
    normal = normalised(value, statistics, column, inside, channels)
    gradient = _passed(d, None, None, normal, weight, bias, offsets, mask, column, inside, RELU)
    average = tl.load(sums + column, mask=inside, other=0) / rows
    along = tl.load(sums + channels + column, mask=inside, other=0) / rows
    rstd = tl.load(statistics + channels + column, mask=inside, other=0)
    gamma = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    result = (gradient - average[None, :] - normal * along[None, :]) * (gamma * rstd)[None, :]
    tl.store(d_x + offsets, result.to(d_x.dtype.element_ty), mask=mask)


def run_backward(
    d_y: Tensor,
    d_again: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `run_normalise`, through the statistics of x, too.

    Args:
        d_again: a second reader's gradient, added to the first's; with y only.
        y: the result; None: no residual was added.

    Returns:
        Gradient by x; that by the residual, empty if y is None; (2,C) float32 gradients by bias and by weight.
    """
    d_y, x, weight, bias = channels_last(d_y), channels_last(x), weight.contiguous(), bias.contiguous()
    d_x, d_residual = torch.empty_like(x), x.new_empty((0,)) if y is None else torch.empty_like(x)
    channels = x.shape[1]
    rows = x.numel() // channels
    again = None if d_again is None else rows_of(channels_last(d_again))
    # The gradient by the residual is that behind the ReLU: who writes it need not mask it again.
    result, masked = (None, None) if y is None else (rows_of(channels_last(y)), rows_of(d_residual))
    grid, per_program, options = sums_grid("batch_norm_gradient_sums", rows, channels, x.device)
    partial = x.new_empty((2, grid[0], channels), dtype=torch.float32)
    given = rows_of(d_y), again, rows_of(x), result, weight, bias, statistics
    launch(_sums_kernel, grid, *given, masked, partial, rows, channels, per_program, RELU=relu, **options)
    sums = x.new_empty((2, channels), dtype=torch.float32)
    grid_of_sums, options = finish_grid(channels, grid[0], x.device)
    launch(_add_up_kernel, grid_of_sums, partial, sums, channels, grid[0], **options)
    grid, options = pass_grid(rows, channels, x.device)
    gradient = rows_of(d_y) if masked is None else masked
    given_again = gradient, rows_of(x), weight, bias, statistics, sums
    launch(_gradient_kernel, grid, *given_again, rows_of(d_x), rows, channels, RELU=relu and masked is None, **options)
    return d_x, d_residual, sums

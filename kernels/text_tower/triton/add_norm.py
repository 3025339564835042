"""x + delta and its LayerNorm in one pass; backward adds the residual's gradient in one pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import launch
from ...primitives import follow
from ..eager import add_norm as eager_add_norm
from ..reference import TextTower


@triton.jit
def _add_norm_kernel(
    x,  # (rows,W)
    delta,  # (rows,W), or None
    weight,  # (W,)
    bias,  # (W,)
    total,  # (rows,W): x + delta; None without delta
    normal,  # (rows,W): its LayerNorm
    statistics,  # (2,rows) float32: mean, reciprocal standard deviation
    rows,
    width,
    eps,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < width
    offsets = row.to(tl.int64) * width + column
    value = tl.load(x + offsets, mask=mask, other=0).to(tl.float32)
    if delta is not None:
        value += tl.load(delta + offsets, mask=mask, other=0).to(tl.float32)
        # The statistics are those of what is stored, so that backward finds the same x̂.
        stored = value.to(total.dtype.element_ty)
        tl.store(total + offsets, stored, mask=mask)
        value = stored.to(tl.float32)
    mean = tl.sum(value, 0) / width
    centred = tl.where(mask, value - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    gamma = tl.load(weight + column, mask=mask, other=0).to(tl.float32)
    beta = tl.load(bias + column, mask=mask, other=0).to(tl.float32)
    tl.store(normal + offsets, (centred * rstd * gamma + beta).to(normal.dtype.element_ty), mask=mask)
    tl.store(statistics + row, mean)
    tl.store(statistics + rows + row, rstd)


@triton.jit
def _add_norm_backward_kernel(
    d_total,  # (rows,W), or None: zero
    d_normal,  # (rows,W)
    total,  # (rows,W)
    statistics,  # (2,rows) float32
    weight,  # (W,), or None: the gradient has it already
    d_x,  # (rows,W)
    rows,
    width,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < width
    offsets = row.to(tl.int64) * width + column
    mean, rstd = tl.load(statistics + row), tl.load(statistics + rows + row)
    value = tl.load(total + offsets, mask=mask, other=0).to(tl.float32)
    normal = tl.where(mask, (value - mean) * rstd, 0.0)
    gradient = tl.load(d_normal + offsets, mask=mask, other=0).to(tl.float32)
    if weight is not None:
        gradient *= tl.load(weight + column, mask=mask, other=0).to(tl.float32)
    average, along = tl.sum(gradient, 0) / width, tl.sum(gradient * normal, 0) / width
    d = (gradient - average - normal * along) * rstd
    if d_total is not None:
        d += tl.load(d_total + offsets, mask=mask, other=0).to(tl.float32)
    tl.store(d_x + offsets, d.to(d_x.dtype.element_ty), mask=mask)


def run_add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta (…,W), its LayerNorm, and (2,rows) float32 mean and reciprocal standard deviation of each row.

    Without delta the first result is empty: it would be x.
    """
    x, delta = x.contiguous(), None if delta is None else delta.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    total, normal = x.new_empty((0,)) if delta is None else torch.empty_like(x), torch.empty_like(x)
    statistics = x.new_empty((2, rows), dtype=torch.float32)
    arguments = (x, delta, weight, bias, None if delta is None else total, normal, statistics, rows, width, eps)
    launch(_add_norm_kernel, (rows,), *arguments, **one_row(width))
    return total, normal, statistics


def run_add_norm_backward(
    d_total: Tensor | None, d_normal: Tensor, total: Tensor, statistics: Tensor, weight: Tensor | None
) -> Tensor:
    """Gradient by x, which is also that by delta.

    `d_total` None: nobody else reads x + delta; `weight` None: `d_normal` is multiplied by it already.
    """
    d_total, d_normal = None if d_total is None else d_total.contiguous(), d_normal.contiguous()
    width = total.shape[-1]
    rows = total.numel() // width
    d_x = torch.empty_like(total)
    arguments = (d_total, d_normal, total, statistics, weight, d_x, rows, width)
    launch(_add_norm_backward_kernel, (rows,), *arguments, **one_row(width))
    return d_x


def one_row(width: int) -> dict[str, int]:
    """One row a program, eight elements a thread: one 128-bit load of a short dtype."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


add_norm_forward = torch.library.custom_op("pspg::add_norm", run_add_norm, mutates_args=())
add_norm_backward = torch.library.custom_op("pspg::add_norm_backward", run_add_norm_backward, mutates_args=())


@add_norm_forward.register_fake
def _(x: Tensor, delta: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    total, normal = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    return (
        x.new_empty((0,)) if delta is None else total,
        normal,
        x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32),
    )


@add_norm_backward.register_fake
def _(d_total: Tensor | None, d_normal: Tensor, total: Tensor, *_: Tensor | None) -> Tensor:
    return torch.empty_like(total, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[0], output[2], inputs[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # or zeros are written for the statistics


def _backward(ctx: Any, d_total: Tensor | None, d_normal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    d_x = d_total if d_normal is None else add_norm_backward(d_total, d_normal, *ctx.saved_tensors)
    return d_x, d_x, None, None, None


add_norm_forward.register_autograd(_backward, setup_context=_save)


def add_norm(tower: TextTower, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`BlockOperations.add_norm`."""
    if delta is None:  # nothing to add, and no room for a kernel to save anything
        return eager_add_norm(tower, x, None, weight, bias)
    total, normal, _ = add_norm_forward(x, delta, weight, bias, tower.eps)
    return total, normal

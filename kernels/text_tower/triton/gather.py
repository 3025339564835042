"""Rows of a table, whose gradients are summed in a fixed order, without atomics."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import configuration, launch, pin
from ...primitives import follow
from ..block_operations import RaggedPairs

pin("gather_backward", sm_80={"BLOCK": 1024, "num_warps": 4})


@triton.jit
def _gather_backward_kernel(
    gradient,  # (R,size)
    order,  # (R,) int64, or None: 0, 1, 2 …
    starts,  # (rows+1,) int64
    out,  # (rows,size)
    size,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(tl.load(starts + row), tl.load(starts + row + 1)):
        source = k
        if order is not None:
            source = tl.load(order + k)
        total += tl.load(gradient + source * size + column, mask=mask, other=0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * size + column, total.to(out.dtype.element_ty), mask=mask)


def run_gather(table: Tensor, index: Tensor, order: Tensor | None, starts: Tensor) -> Tensor:
    """table[index]; `order` and `starts` tell backward who took which row, as in `run_gather_backward`."""
    return table.index_select(0, index)


def run_gather_backward(gradient: Tensor, order: Tensor | None, starts: Tensor) -> Tensor:
    """Sums of rows of `gradient`: row j adds up rows order[starts[j]] to order[starts[j+1]]; order None: 0, 1, 2 …"""
    gradient = gradient.contiguous()
    rows, size = len(starts) - 1, gradient[:1].numel()
    out = gradient.new_empty((rows, *gradient.shape[1:]))
    options = configuration("gather_backward", gradient.device)
    grid = (rows, triton.cdiv(size, options["BLOCK"]))
    launch(_gather_backward_kernel, grid, *(gradient, order, starts, out, size), **options)
    return out


_gather = torch.library.custom_op("pspg::gather", run_gather, mutates_args=())
_gather_backward = torch.library.custom_op("pspg::gather_backward", run_gather_backward, mutates_args=())


@_gather.register_fake
def _(table: Tensor, index: Tensor, order: Tensor | None, starts: Tensor) -> Tensor:
    return table.new_empty((len(index), *table.shape[1:]))


@_gather_backward.register_fake
def _(gradient: Tensor, order: Tensor | None, starts: Tensor) -> Tensor:
    return gradient.new_empty((len(starts) - 1, *gradient.shape[1:]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _gather_backward(gradient, *ctx.saved_tensors), None, None, None


_gather.register_autograd(_backward, setup_context=_save)


def gather_prefix(table: Tensor, pairs: RaggedPairs) -> Tensor:
    """`BlockOperations.gather_prefix`."""
    return _gather(table, pairs.prefix_index, None, pairs.starts)


def gather_suffix(table: Tensor, pairs: RaggedPairs) -> Tensor:
    """`BlockOperations.gather_suffix`."""
    return _gather(table, pairs.suffix_index, *pairs.by_suffix)

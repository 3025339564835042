"""LayerNorm before the last block, of all tokens, and one token a sequence of it and its input.

Backward takes the gradients of the one token where it stands, in the pass over all: no tensor of zeros around it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...launch import launch
from ...primitives import follow
from ..block_operations import RaggedPairs, Stream
from ..reference import TextTower
from .add_norm import add_norm_forward, one_row


@triton.jit
def _pooled_norm_backward_kernel(
    d_x_pooled,  # (R,W)
    d_pooled,  # (R,W)
    d_normal,  # (rows,W)
    total,  # (rows,W)
    statistics,  # (2,rows) float32
    weight,  # (W,)
    pooled,  # (R,) or None: the last token
    d_x,  # (rows,W)
    rows,
    offset,  # rows before those of the sequences
    tokens,  # of a sequence
    width,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    row = tl.program_id(0)
    sequence = (row - offset) // tokens
    chosen = tokens - 1
    if pooled is not None:
        chosen = tl.load(pooled + sequence, mask=row >= offset, other=0)
    column = tl.arange(0, BLOCK)
    mask = column < width
    # Blocks are not combined with scalars: the interpreter of triton 3.9 makes integers of them.
    here = column < tl.where((row >= offset) & ((row - offset) % tokens == chosen), width, 0)
    offsets, one = row.to(tl.int64) * width + column, sequence.to(tl.int64) * width + column
    mean, rstd = tl.load(statistics + row), tl.load(statistics + rows + row)
    normal = tl.load(total + offsets, mask=mask, other=0).to(tl.float32)
    normal = tl.where(mask, (normal - mean) * rstd, 0.0)
    gradient = tl.load(d_normal + offsets, mask=mask, other=0).to(tl.float32)
    gradient += tl.load(d_pooled + one, mask=here, other=0).to(tl.float32)
    gradient *= tl.load(weight + column, mask=mask, other=0).to(tl.float32)
    average, along = tl.sum(gradient, 0) / width, tl.sum(gradient * normal, 0) / width
    d = (gradient - average - normal * along) * rstd
    d += tl.load(d_x_pooled + one, mask=here, other=0).to(tl.float32)
    tl.store(d_x + offsets, d.to(d_x.dtype.element_ty), mask=mask)


def run_pooled_norm_backward(
    d_x_pooled: Tensor,
    d_pooled: Tensor,
    d_normal: Tensor,
    total: Tensor,
    statistics: Tensor,
    weight: Tensor,
    pooled: Tensor | None,
    tokens: int,
) -> Tensor:
    """Gradient by x (rows,W).

    Args:
        d_x_pooled, d_pooled: (R,W) gradients of one token a sequence, of x and of its LayerNorm.
        d_normal: (rows,W) gradient of the LayerNorm of all.
        total: (rows,W), the LayerNorm's input; the last R·tokens rows are those of the sequences.
        statistics: (2,rows) float32.
        weight: (W,).
        pooled: (R,) the token of each sequence; None: its last.
        tokens: of a sequence.
    """
    d_x_pooled, d_pooled, d_normal = (t.contiguous() for t in (d_x_pooled, d_pooled, d_normal))
    rows, width = total.shape
    d_x = torch.empty_like(total)
    arguments = (d_x_pooled, d_pooled, d_normal, total, statistics, weight, pooled, d_x)
    sizes = (rows, rows - len(d_pooled) * tokens, tokens, width)
    launch(_pooled_norm_backward_kernel, (rows,), *arguments, *sizes, **one_row(width))
    return d_x


pooled_norm_backward = torch.library.custom_op("pspg::pooled_norm_backward", run_pooled_norm_backward, mutates_args=())


@pooled_norm_backward.register_fake
def _(d_x_pooled: Tensor, d_pooled: Tensor, d_normal: Tensor, total: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(total, memory_format=torch.contiguous_format)


class _PooledNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, pairs: RaggedPairs
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total, normal, statistics = add_norm_forward(x, delta, weight, bias, eps)
        total = x if delta is None else total
        ctx.save_for_backward(total, statistics, weight, pairs.pooled)
        ctx.tokens, ctx.sequences, ctx.added = pairs.suffix_tokens, len(pairs.prefix_index), delta is not None
        return pairs.pool(total), pairs.pool(normal), normal

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_x_pooled: Tensor | None, d_pooled: Tensor | None, d_normal: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        total, statistics, weight, pooled = ctx.saved_tensors
        rows = total.flatten(0, -2)
        one = rows[: ctx.sequences]
        gradients = [torch.zeros_like(one) if d is None else d for d in (d_x_pooled, d_pooled)]
        d_normal = torch.zeros_like(rows) if d_normal is None else d_normal.view(rows.shape)
        d_x = pooled_norm_backward(*gradients, d_normal, rows, statistics, weight, pooled, ctx.tokens).view(total.shape)
        return d_x, d_x if ctx.added else None, None, None, None, None


def pooled_norm(
    tower: TextTower, stream: Stream, weight: Tensor, bias: Tensor, pairs: RaggedPairs
) -> tuple[Tensor, Tensor, Tensor]:
    """`BlockOperations.pooled_norm`."""
    return _PooledNorm.apply(stream.x, stream.delta, weight, bias, tower.eps, pairs)

"""Sums of what several programs have left, in a fixed order, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import configuration, launch, pin
from ...primitives import follow

# SPLITS at a time are loaded together: a loop over them would wait for each.
pin("sum_partial", sm_80={"BLOCK": 256, "SPLITS": 16, "num_warps": 4})


@triton.jit
def _sum_partial_kernel(
    partial,  # (splits,size) float32
    out,  # (size,)
    splits,
    size,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, splits, SPLITS):
        row = first + tl.arange(0, SPLITS)
        mask = (row < splits)[:, None] & (column < size)[None, :]
        offsets = row.to(tl.int64)[:, None] * size + column[None, :]
        total += tl.sum(tl.load(partial + offsets, mask=mask, other=0), 0)
    tl.store(out + column, total.to(out.dtype.element_ty), mask=column < size)


def empty_partial(splits: int, like: Tensor) -> Tensor:
    """(splits,…) for kernels to leave their parts of a tensor like `like` in, each in its own row.

    float32; of one program alone in the dtype of the whole, which it then is.
    """
    return like.new_empty((splits, *like.shape), dtype=torch.float32 if splits > 1 else like.dtype)


def sum_partial(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the first dimension of what `empty_partial` gave, in `dtype`."""
    if len(partial) == 1:
        return partial[0]
    out = torch.empty_like(partial[0], dtype=dtype)
    options = configuration("sum_partial", partial.device)
    grid = (triton.cdiv(out.numel(), options["BLOCK"]),)
    launch(_sum_partial_kernel, grid, *(partial, out, len(partial), out.numel()), **options)
    return out

"""Attention of suffixes to their cached prefix and to themselves.

A tile has the queries of several suffixes of one prefix, neighbours in memory: they share the prefix's keys, and a mask
keeps suffixes apart. A program goes through several tiles. Backward sums what suffixes leave at a prefix in a fixed
order: first within a program, then over programs, without atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import configuration, launch, pin
from ...primitives import follow
from ..block_operations import RaggedPairs
from ..eager import attend
from .gather import gather_prefix
from .partial_sums import empty_partial, sum_partial

# ROWS: queries of a tile. Hopper's and Blackwell's tensor cores take 64 at once; before them registers are too few.
pin("suffix_attention", sm_80={"ROWS": 64, "num_warps": 4, "num_stages": 1})
pin(
    "suffix_attention_backward",
    sm_80={"ROWS": 32, "num_warps": 4, "num_stages": 1},
    sm_90={"ROWS": 64, "num_warps": 4, "num_stages": 1},
    sm_100={"ROWS": 64, "num_warps": 8, "num_stages": 1},
)
_SUFFIXES = 9
"""suffixes of one prefix that a program takes, on average"""
_MOST_TOKENS = 64
"""of a suffix or a prefix"""


@triton.jit
def _load_prefix(
    prefix_kv, starts, prefix_lengths, HEADS: tl.constexpr, PREFIX_TOKENS: tl.constexpr, WIDTH: tl.constexpr
):
    """A program's prefix in its head: keys, values, which of its tokens are seen (1,S), offsets and mask."""
    BLOCK_S: tl.constexpr = max(triton.next_power_of_2(PREFIX_TOKENS), 16)
    BLOCK_D: tl.constexpr = max(triton.next_power_of_2(WIDTH), 16)
    i = tl.program_id(0)
    width: tl.constexpr = HEADS * WIDTH
    length = PREFIX_TOKENS
    if prefix_lengths is not None:  # the same for all suffixes of a prefix; a prefix may have none
        first = tl.load(starts + i)
        length = tl.load(prefix_lengths + first, mask=first < tl.load(starts + i + 1), other=1).to(tl.int32)
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    offsets = (i.to(tl.int64) * PREFIX_TOKENS + s)[:, None] * (2 * width) + (tl.program_id(1) * WIDTH + d)[None, :]
    seen = (s < length)[:, None] & (d < WIDTH)[None, :]
    k = tl.load(prefix_kv + offsets, mask=seen, other=0)
    v = tl.load(prefix_kv + offsets + width, mask=seen, other=0)
    mask = (s < PREFIX_TOKENS)[:, None] & (d < WIDTH)[None, :]
    return k, v, (s < length)[None, :], offsets, mask


@triton.jit
def _own_mask(TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """(rows,rows) of a tile: true where a row sees another, itself or an earlier one of the same suffix."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
    return (row // TOKENS == column // TOKENS) & (row >= column)


@triton.jit
def _load_tile(qkv, tail, end, HEADS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, TAILS: tl.constexpr):
    """q, k, v of suffixes tail to tail + TAILS, as far as they are before `end`; their rows, columns and mask."""
    ROWS: tl.constexpr = max(triton.next_power_of_2(TAILS * TOKENS), 16)
    BLOCK_D: tl.constexpr = max(triton.next_power_of_2(WIDTH), 16)
    width: tl.constexpr = HEADS * WIDTH
    row, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside = row < tl.minimum(end - tail, TAILS).to(tl.int32) * TOKENS
    mask = inside[:, None] & (d < WIDTH)[None, :]
    source = qkv + tail * (TOKENS * 3 * width) + tl.program_id(1) * WIDTH + row[:, None] * (3 * width) + d[None, :]
    q = tl.load(source, mask=mask, other=0)
    k = tl.load(source + width, mask=mask, other=0)
    v = tl.load(source + 2 * width, mask=mask, other=0)
    return q, k, v, inside, mask


@triton.jit
def _attention_kernel(
    qkv,  # (R,T,3W)
    prefix_kv,  # (N,S,2W)
    starts,  # (N+1,) int64
    prefix_lengths,  # (R,) or None
    out,  # (R,T,W)
    lse,  # (heads,R,T) float32
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,  # T; constants, so that loads are known to be aligned
    PREFIX_TOKENS: tl.constexpr,  # S
    WIDTH: tl.constexpr,  # of a head
    TAILS: tl.constexpr,  # suffixes of a tile
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    PRECISION: tl.constexpr = "tf32x3" if qkv.dtype.element_ty == tl.float32 else "tf32"  # of float32 products only
    ROWS: tl.constexpr = max(triton.next_power_of_2(TAILS * TOKENS), 16)
    BLOCK_D: tl.constexpr = max(triton.next_power_of_2(WIDTH), 16)
    SCALE: tl.constexpr = WIDTH**-0.5 * 1.4426950408889634  # times log2(e): powers of 2 are what the hardware computes
    i, head = tl.program_id(0), tl.program_id(1)
    width: tl.constexpr = HEADS * WIDTH
    row, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    lse += head * tl.load(starts + tl.num_programs(0)) * TOKENS
    prefix_k, prefix_v, seen, _, _ = _load_prefix(prefix_kv, starts, prefix_lengths, HEADS, PREFIX_TOKENS, WIDTH)
    # Added, as an addition costs nothing behind a product.
    prefix_bias = tl.where(seen, 0.0, float("-inf"))
    own_bias = tl.where(_own_mask(TOKENS, ROWS), 0.0, float("-inf"))
    end = tl.load(starts + i + 1)
    for tail in range(tl.load(starts + i) + tl.program_id(2) * TAILS, end, tl.num_programs(2) * TAILS):
        q, k, v, inside, mask = _load_tile(qkv, tail, end, HEADS, TOKENS, WIDTH, TAILS)
        p_prefix = tl.dot(q, tl.trans(prefix_k), input_precision=PRECISION) * SCALE + prefix_bias
        p_own = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE + own_bias
        row_max = tl.maximum(tl.max(p_prefix, 1), tl.max(p_own, 1))
        p_prefix, p_own = tl.exp2(p_prefix - row_max[:, None]), tl.exp2(p_own - row_max[:, None])
        row_sum = tl.sum(p_prefix, 1) + tl.sum(p_own, 1)
        total = tl.dot(p_prefix.to(v.dtype), prefix_v, input_precision=PRECISION)
        total = tl.dot(p_own.to(v.dtype), v, total, input_precision=PRECISION)
        total = total * (1 / row_sum)[:, None]
        target = out + tail * (TOKENS * width) + head * WIDTH + row[:, None] * width + d[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=mask)
        tl.store(lse + tail * TOKENS + row, row_max + tl.log2(row_sum), mask=inside)


@triton.jit
def _attention_backward_kernel(
    d_out,  # (R,T,W)
    qkv,  # (R,T,3W)
    prefix_kv,  # (N,S,2W)
    starts,  # (N+1,) int64
    prefix_lengths,  # (R,) or None
    lse,  # (heads,R,T) float32
    d_qkv,  # (R,T,3W)
    partial,  # (splits,N,S,2W) gradients of prefix_kv, to be summed; or None
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    PREFIX_TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    TAILS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    PRECISION: tl.constexpr = "tf32x3" if qkv.dtype.element_ty == tl.float32 else "tf32"
    ROWS: tl.constexpr = max(triton.next_power_of_2(TAILS * TOKENS), 16)
    BLOCK_D: tl.constexpr = max(triton.next_power_of_2(WIDTH), 16)
    BLOCK_S: tl.constexpr = max(triton.next_power_of_2(PREFIX_TOKENS), 16)
    FACTOR: tl.constexpr = WIDTH**-0.5
    SCALE: tl.constexpr = FACTOR * 1.4426950408889634
    i, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width: tl.constexpr = HEADS * WIDTH
    row, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    lse += head * tl.load(starts + tl.num_programs(0)) * TOKENS
    prefix_k, prefix_v, seen, prefix_offsets, prefix_mask = _load_prefix(
        prefix_kv, starts, prefix_lengths, HEADS, PREFIX_TOKENS, WIDTH
    )
    own = _own_mask(TOKENS, ROWS)
    # Transposed: the tile's rows are summed over, and a head is as wide as the tensor cores like.
    d_prefix_k = tl.zeros((BLOCK_D, BLOCK_S), tl.float32)
    d_prefix_v = tl.zeros((BLOCK_D, BLOCK_S), tl.float32)
    end = tl.load(starts + i + 1)
    for tail in range(tl.load(starts + i) + split * TAILS, end, tl.num_programs(2) * TAILS):
        # Rows beyond the last suffix have q = do = 0, so that they add nothing anywhere.
        q, k, v, inside, mask = _load_tile(qkv, tail, end, HEADS, TOKENS, WIDTH, TAILS)
        source = d_out + tail * (TOKENS * width) + head * WIDTH + row[:, None] * width + d[None, :]
        do = tl.load(source, mask=mask, other=0)
        row_lse = tl.load(lse + tail * TOKENS + row, mask=inside, other=0)[:, None]
        p_prefix = tl.dot(q, tl.trans(prefix_k), input_precision=PRECISION) * SCALE - row_lse
        p_own = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE - row_lse
        p_prefix, p_own = tl.where(seen, tl.exp2(p_prefix), 0.0), tl.where(own, tl.exp2(p_own), 0.0)
        dp_prefix = tl.dot(do, tl.trans(prefix_v), input_precision=PRECISION)
        dp_own = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        delta = (tl.sum(p_prefix * dp_prefix, 1) + tl.sum(p_own * dp_own, 1))[:, None] * FACTOR
        dp_prefix = (p_prefix * (dp_prefix * FACTOR - delta)).to(q.dtype)
        dp_own = (p_own * (dp_own * FACTOR - delta)).to(q.dtype)
        if partial is not None:
            d_prefix_v = tl.dot(tl.trans(do), p_prefix.to(q.dtype), d_prefix_v, input_precision=PRECISION)
            d_prefix_k = tl.dot(tl.trans(q), dp_prefix, d_prefix_k, input_precision=PRECISION)
        target = d_qkv + tail * (TOKENS * 3 * width) + head * WIDTH + row[:, None] * (3 * width) + d[None, :]
        d_v = tl.dot(tl.trans(p_own.to(q.dtype)), do, input_precision=PRECISION)
        tl.store(target + 2 * width, d_v.to(q.dtype), mask=mask)
        d_k = tl.dot(tl.trans(dp_own), q, input_precision=PRECISION)
        tl.store(target + width, d_k.to(q.dtype), mask=mask)
        d_q = tl.dot(dp_prefix, prefix_k, input_precision=PRECISION)
        d_q = tl.dot(dp_own, k, d_q, input_precision=PRECISION)
        tl.store(target, d_q.to(q.dtype), mask=mask)
    if partial is not None:
        partial += split.to(tl.int64) * tl.num_programs(0) * PREFIX_TOKENS * 2 * width
        tl.store(partial + prefix_offsets, tl.trans(d_prefix_k).to(partial.dtype.element_ty), mask=prefix_mask)
        target = partial + prefix_offsets + width
        tl.store(target, tl.trans(d_prefix_v).to(partial.dtype.element_ty), mask=prefix_mask)


def run_attention(
    qkv: Tensor, prefix_kv: Tensor, starts: Tensor, prefix_lengths: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    """Attention of R suffixes, each to its prefix and causally to itself.

    Args:
        qkv: (R,T,3W) queries, keys and values of the suffixes.
        prefix_kv: (N,S,2W) keys and values of the prefixes.
        starts: (N+1,) suffixes starts[i] to starts[i+1] continue prefix i.
        prefix_lengths: (R,) tokens of its prefix that each suffix sees, at least 1; None: all.
        heads: they divide W.

    Returns:
        (R,T,W), and the (heads,R,T) float32 logarithm to base 2 of the sum of each query's exponentiated scores.
    """
    qkv, prefix_kv = qkv.contiguous(), prefix_kv.contiguous()
    suffixes, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out = qkv.new_empty((suffixes, tokens, width))
    lse = qkv.new_empty((heads, suffixes, tokens), dtype=torch.float32)
    grid, options = _tiling("suffix_attention", qkv, prefix_kv, heads)
    launch(_attention_kernel, grid, *(qkv, prefix_kv, starts, prefix_lengths, out, lse), **options)
    return out, lse


def run_attention_backward(
    d_out: Tensor,
    qkv: Tensor,
    prefix_kv: Tensor,
    starts: Tensor,
    prefix_lengths: Tensor | None,
    lse: Tensor,
    heads: int,
    prefix_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients by `qkv` and, if `prefix_gradient`, by `prefix_kv` (else an empty tensor)."""
    d_out, qkv, prefix_kv = d_out.contiguous(), qkv.contiguous(), prefix_kv.contiguous()
    d_qkv = torch.empty_like(qkv)
    grid, options = _tiling("suffix_attention_backward", qkv, prefix_kv, heads)
    partial = empty_partial(grid[2], prefix_kv) if prefix_gradient else None
    arguments = (d_out, qkv, prefix_kv, starts, prefix_lengths, lse, d_qkv, partial)
    launch(_attention_backward_kernel, grid, *arguments, **options)
    return d_qkv, prefix_kv.new_empty((0,)) if partial is None else sum_partial(partial, prefix_kv.dtype)


def _tiling(kernel: str, qkv: Tensor, prefix_kv: Tensor, heads: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid, and the kernel's constants and options."""
    suffixes, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    prefixes, prefix_tokens, _ = prefix_kv.shape
    options = configuration(kernel, qkv.device)
    each = max(triton.cdiv(suffixes, max(prefixes, 1)), 1)  # suffixes of a prefix, on average
    tails = min(max(options.pop("ROWS") // tokens, 1), each)
    splits = triton.cdiv(each, triton.cdiv(_SUFFIXES, tails) * tails)
    constants = {
        "HEADS": heads,
        "TOKENS": tokens,
        "PREFIX_TOKENS": prefix_tokens,
        "WIDTH": width // heads,
        "TAILS": tails,
    }
    return (prefixes, heads, splits), {**constants, **options}


_attention = torch.library.custom_op("pspg::suffix_attention", run_attention, mutates_args=())
_attention_backward = torch.library.custom_op(
    "pspg::suffix_attention_backward", run_attention_backward, mutates_args=()
)


@_attention.register_fake
def _(
    qkv: Tensor, prefix_kv: Tensor, starts: Tensor, prefix_lengths: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    suffixes, suffix_tokens, width = qkv.shape
    lse = qkv.new_empty((heads, suffixes, suffix_tokens), dtype=torch.float32)
    return qkv.new_empty((suffixes, suffix_tokens, width // 3)), lse


@_attention_backward.register_fake
def _(d_out: Tensor, qkv: Tensor, prefix_kv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    return d_qkv, prefix_kv.new_empty(prefix_kv.shape if rest[-1] else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.heads = inputs[4]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or zeros are written for the log-sum-exp


def _backward(ctx: Any, d_out: Tensor, _: None) -> tuple[Tensor | None, ...]:
    prefix_gradient = ctx.needs_input_grad[1]
    d_qkv, d_prefix_kv = _attention_backward(d_out, *ctx.saved_tensors, ctx.heads, prefix_gradient)
    return d_qkv, d_prefix_kv if prefix_gradient else None, None, None, None


_attention.register_autograd(_backward, setup_context=_save)


def attention(heads: int, qkv: Tensor, prefix_kv: Tensor, pairs: RaggedPairs) -> Tensor:
    """`BlockOperations.attention`."""
    # Compiled, products of three TF32 and tiles of more rows need more registers than there are.
    if qkv.is_cuda and (qkv.dtype == torch.float32 or max(pairs.suffix_tokens, pairs.prefix_tokens) > _MOST_TOKENS):
        return attend(heads, qkv, gather_prefix(prefix_kv, pairs), pairs.mask)
    return _attention(qkv, prefix_kv, pairs.starts, pairs.prefix_lengths, heads)[0]

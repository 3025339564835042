"""Attention of the last block: one token a sequence asks, heads of the tower's whole width, keys are values.

The cached states of prefixes are read where they are. Backward writes a sequence's weights and their gradients at its
prefix, and a second kernel sums what they leave there in a fixed order, without atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...launch import configuration, launch, pin
from ...primitives import follow
from ..block_operations import RaggedPairs
from .partial_sums import empty_partial, sum_partial

pin("pooled_attention", sm_80={"BLOCK_W": 64, "num_warps": 4, "num_stages": 2})
pin("pooled_attention_float32", sm_80={"BLOCK_W": 32, "num_warps": 4, "num_stages": 2})  # registers of tf32x3
pin("pooled_attention_prefix", sm_80={"BLOCK_W": 64, "num_warps": 4, "num_stages": 2})
_SEQUENCES = 8
"""sequences of one prefix that a program sums, on average"""


@triton.jit
def _rows(x, row, rows, column, width, BLOCK_R: tl.constexpr):
    """Rows (BLOCK_R, columns) of a matrix (…,width) from `row` on, zeros from `rows` on."""
    r = tl.arange(0, BLOCK_R)
    mask = (r < rows)[:, None] & (column < width)[None, :]
    return tl.load(x + row * width + (r[:, None] * width + column[None, :]), mask=mask, other=0)


@triton.jit
def _heads(x, r, sequences, heads, column, width, BLOCK_H: tl.constexpr):
    """Pointers to the rows (BLOCK_H, columns) of sequence r in (heads,sequences,width), and which there are."""
    h = tl.arange(0, BLOCK_H)
    rows = h.to(tl.int64) * sequences + r
    return x + (rows[:, None] * width + column[None, :]), (h < heads)[:, None] & (column < width)[None, :]


@triton.jit
def _seen(r, prefix_lengths, pooled, prefix_tokens, tokens, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr):
    """Which tokens of its prefix and its own sequence r sees."""
    length, last = prefix_tokens, tokens - 1
    if prefix_lengths is not None:
        length = tl.load(prefix_lengths + r)
    if pooled is not None:
        last = tl.load(pooled + r)
    return (tl.arange(0, BLOCK_S) < length)[None, :], (tl.arange(0, BLOCK_T) <= last)[None, :]


@triton.jit
def _pooled_attention_kernel(
    query,  # (heads,R,W)
    prefix,  # (N,S,W)
    own,  # (R,T,W)
    prefix_index,  # (R,)
    prefix_lengths,  # (R,) or None
    pooled,  # (R,) or None
    out,  # (heads,R,W)
    lse,  # (R,heads) float32
    heads,
    prefix_tokens,
    tokens,
    width,
    scale,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    r, sequences = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    base = tl.load(prefix_index + r) * prefix_tokens
    seen_prefix, seen_own = _seen(r, prefix_lengths, pooled, prefix_tokens, tokens, BLOCK_S, BLOCK_T)
    p_prefix, p_own = tl.zeros((BLOCK_H, BLOCK_S), tl.float32), tl.zeros((BLOCK_H, BLOCK_T), tl.float32)
    for start in range(0, width, BLOCK_W):
        c = start + tl.arange(0, BLOCK_W)
        pointers, mask = _heads(query, r, sequences, heads, c, width, BLOCK_H)
        q = tl.load(pointers, mask=mask, other=0)
        y = _rows(prefix, base, prefix_tokens, c, width, BLOCK_S)
        p_prefix = tl.dot(q, tl.trans(y), p_prefix, input_precision=PRECISION)
        y = _rows(own, r * tokens, tokens, c, width, BLOCK_T)
        p_own = tl.dot(q, tl.trans(y), p_own, input_precision=PRECISION)
    p_prefix = tl.where(seen_prefix, p_prefix * scale, float("-inf"))
    p_own = tl.where(seen_own, p_own * scale, float("-inf"))
    row_max = tl.maximum(tl.max(p_prefix, 1), tl.max(p_own, 1))
    p_prefix, p_own = tl.exp(p_prefix - row_max[:, None]), tl.exp(p_own - row_max[:, None])
    row_sum = tl.sum(p_prefix, 1) + tl.sum(p_own, 1)
    h = tl.arange(0, BLOCK_H)
    tl.store(lse + r * heads + h, row_max + tl.log(row_sum), mask=h < heads)
    p_prefix = (p_prefix / row_sum[:, None]).to(out.dtype.element_ty)
    p_own = (p_own / row_sum[:, None]).to(out.dtype.element_ty)
    for start in range(0, width, BLOCK_W):
        c = start + tl.arange(0, BLOCK_W)
        mean = tl.dot(p_prefix, _rows(prefix, base, prefix_tokens, c, width, BLOCK_S), input_precision=PRECISION)
        mean = tl.dot(p_own, _rows(own, r * tokens, tokens, c, width, BLOCK_T), mean, input_precision=PRECISION)
        pointers, mask = _heads(out, r, sequences, heads, c, width, BLOCK_H)
        tl.store(pointers, mean.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _pooled_attention_backward_kernel(
    d_out,  # (heads,R,W)
    query,  # (heads,R,W)
    prefix,  # (N,S,W)
    own,  # (R,T,W)
    prefix_index,  # (R,)
    prefix_lengths,  # (R,) or None
    pooled,  # (R,) or None
    lse,  # (R,heads) float32
    d_query,  # (heads,R,W)
    d_own,  # (R,T,W)
    weights,  # (R,2·heads,S) at the prefix: softmax weights, gradients of scores times scale; or None
    heads,
    prefix_tokens,
    tokens,
    width,
    scale,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    r, sequences = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    base = tl.load(prefix_index + r) * prefix_tokens
    seen_prefix, seen_own = _seen(r, prefix_lengths, pooled, prefix_tokens, tokens, BLOCK_S, BLOCK_T)
    p_prefix, p_own = tl.zeros((BLOCK_H, BLOCK_S), tl.float32), tl.zeros((BLOCK_H, BLOCK_T), tl.float32)
    d_prefix, d_weights = tl.zeros((BLOCK_H, BLOCK_S), tl.float32), tl.zeros((BLOCK_H, BLOCK_T), tl.float32)
    for start in range(0, width, BLOCK_W):
        c = start + tl.arange(0, BLOCK_W)
        pointers, mask = _heads(query, r, sequences, heads, c, width, BLOCK_H)
        q = tl.load(pointers, mask=mask, other=0)
        pointers, mask = _heads(d_out, r, sequences, heads, c, width, BLOCK_H)
        do = tl.load(pointers, mask=mask, other=0)
        y = tl.trans(_rows(prefix, base, prefix_tokens, c, width, BLOCK_S))
        p_prefix = tl.dot(q, y, p_prefix, input_precision=PRECISION)
        d_prefix = tl.dot(do, y, d_prefix, input_precision=PRECISION)
        y = tl.trans(_rows(own, r * tokens, tokens, c, width, BLOCK_T))
        p_own = tl.dot(q, y, p_own, input_precision=PRECISION)
        d_weights = tl.dot(do, y, d_weights, input_precision=PRECISION)
    h = tl.arange(0, BLOCK_H)
    mask_h = (h < heads)[:, None]
    row_lse = tl.load(lse + r * heads + h, mask=h < heads, other=0)[:, None]
    p_prefix = tl.where(seen_prefix & mask_h, tl.exp(p_prefix * scale - row_lse), 0.0)
    p_own = tl.where(seen_own & mask_h, tl.exp(p_own * scale - row_lse), 0.0)
    delta = (tl.sum(p_prefix * d_prefix, 1) + tl.sum(p_own * d_weights, 1))[:, None]
    d_prefix = (p_prefix * (d_prefix - delta) * scale).to(query.dtype.element_ty)
    d_weights = (p_own * (d_weights - delta) * scale).to(query.dtype.element_ty)
    p_own = p_own.to(query.dtype.element_ty)
    if weights is not None:
        s = tl.arange(0, BLOCK_S)
        target = weights + r * 2 * heads * prefix_tokens + (h[:, None] * prefix_tokens + s[None, :])
        inside = mask_h & (s < prefix_tokens)[None, :]
        tl.store(target, p_prefix.to(query.dtype.element_ty), mask=inside)
        tl.store(target + heads * prefix_tokens, d_prefix, mask=inside)
    t = tl.arange(0, BLOCK_T)
    for start in range(0, width, BLOCK_W):
        c = start + tl.arange(0, BLOCK_W)
        d_q = tl.dot(d_prefix, _rows(prefix, base, prefix_tokens, c, width, BLOCK_S), input_precision=PRECISION)
        d_q = tl.dot(d_weights, _rows(own, r * tokens, tokens, c, width, BLOCK_T), d_q, input_precision=PRECISION)
        pointers, mask = _heads(d_query, r, sequences, heads, c, width, BLOCK_H)
        tl.store(pointers, d_q.to(d_query.dtype.element_ty), mask=mask)
        pointers, mask = _heads(d_out, r, sequences, heads, c, width, BLOCK_H)
        do = tl.load(pointers, mask=mask, other=0)
        d_y = tl.dot(tl.trans(p_own), do, input_precision=PRECISION)
        pointers, mask = _heads(query, r, sequences, heads, c, width, BLOCK_H)
        q = tl.load(pointers, mask=mask, other=0)
        d_y = tl.dot(tl.trans(d_weights), q, d_y, input_precision=PRECISION)
        offsets = r * tokens * width + (t[:, None] * width + c[None, :])
        mask = (t < tokens)[:, None] & (c < width)[None, :]
        tl.store(d_own + offsets, d_y.to(d_own.dtype.element_ty), mask=mask)


@triton.jit
def _pooled_attention_prefix_kernel(
    d_out,  # (heads,R,W)
    query,  # (heads,R,W)
    weights,  # (R,2·heads,S), from the kernel above
    starts,  # (N+1,): sequences starts[i] to starts[i+1] continue prefix i
    partial,  # (splits,N,S,W): gradients of the prefixes, to be summed
    sequences,
    heads,
    prefix_tokens,
    width,
    splits,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    i, split = tl.program_id(0), tl.program_id(1)
    c, s = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_S, BLOCK_W), tl.float32)
    for r in range(tl.load(starts + i) + split, tl.load(starts + i + 1), splits):
        first = r * 2 * heads
        p = _rows(weights, first, heads, s, prefix_tokens, BLOCK_H)
        pointers, mask = _heads(d_out, r, sequences, heads, c, width, BLOCK_H)
        do = tl.load(pointers, mask=mask, other=0)
        total = tl.dot(tl.trans(p), do, total, input_precision=PRECISION)
        d = _rows(weights, first + heads, heads, s, prefix_tokens, BLOCK_H)
        pointers, mask = _heads(query, r, sequences, heads, c, width, BLOCK_H)
        q = tl.load(pointers, mask=mask, other=0)
        total = tl.dot(tl.trans(d), q, total, input_precision=PRECISION)
    row = (split.to(tl.int64) * tl.num_programs(0) + i) * prefix_tokens
    offsets = row * width + (s[:, None] * width + c[None, :])
    mask = (s < prefix_tokens)[:, None] & (c < width)[None, :]
    tl.store(partial + offsets, total.to(partial.dtype.element_ty), mask=mask)


def run_pooled_attention(
    query: Tensor,
    prefix: Tensor,
    own: Tensor,
    prefix_index: Tensor,
    prefix_lengths: Tensor | None,
    pooled: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Means of the tokens that R sequences see, weighted for each of their queries.

    Args:
        query: (heads,R,W).
        prefix: (N,S,W) tokens of the prefixes.
        own: (R,T,W) tokens of the sequences after them.
        prefix_index: (R,) int64.
        prefix_lengths: (R,) tokens of its prefix that a sequence sees; None: all.
        pooled: (R,) the last of its own tokens that a sequence sees; None: all.
        scale: of the scores.

    Returns:
        (heads,R,W), and the (R,heads) float32 log-sum-exp of the scores.
    """
    query, prefix, own = query.contiguous(), prefix.contiguous(), own.contiguous()
    heads, count, width = query.shape
    out, lse = torch.empty_like(query), query.new_empty((count, heads), dtype=torch.float32)
    launch(
        _pooled_attention_kernel,
        (count,),
        *(query, prefix, own, prefix_index, prefix_lengths, pooled, out, lse),
        *(heads, prefix.shape[1], own.shape[1], width, scale),
        **_blocks(query, prefix, own),
        **_options(query),
    )
    return out, lse


def run_pooled_attention_backward(
    d_out: Tensor,
    query: Tensor,
    prefix: Tensor,
    own: Tensor,
    prefix_index: Tensor,
    prefix_lengths: Tensor | None,
    pooled: Tensor | None,
    starts: Tensor,
    lse: Tensor,
    scale: float,
    prefix_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by `query`, `own` and, if `prefix_gradient`, `prefix` (else an empty tensor).

    `starts` (N+1,) int64: sequences starts[i] to starts[i+1] continue prefix i.
    """
    d_out, query, prefix, own = (t.contiguous() for t in (d_out, query, prefix, own))
    (heads, count, width), (prefixes, prefix_tokens, _) = query.shape, prefix.shape
    d_query, d_own = torch.empty_like(query), torch.empty_like(own)
    weights = query.new_empty((count, 2 * heads, prefix_tokens)) if prefix_gradient else None
    blocks = _blocks(query, prefix, own)
    launch(
        _pooled_attention_backward_kernel,
        (count,),
        *(d_out, query, prefix, own, prefix_index, prefix_lengths, pooled, lse, d_query, d_own, weights),
        *(heads, prefix_tokens, own.shape[1], width, scale),
        **blocks,
        **_options(query),
    )
    if weights is None:
        return d_query, d_own, prefix.new_empty((0,))
    options = configuration("pooled_attention_prefix", query.device)
    splits = max(triton.cdiv(count, _SEQUENCES * prefixes), 1)
    partial = empty_partial(splits, prefix)
    del blocks["BLOCK_T"]
    launch(
        _pooled_attention_prefix_kernel,
        (prefixes, splits, triton.cdiv(width, options["BLOCK_W"])),
        *(d_out, query, weights, starts, partial, count, heads, prefix_tokens, width, splits),
        **blocks,
        **options,
    )
    return d_query, d_own, sum_partial(partial, prefix.dtype)


def _options(query: Tensor) -> dict[str, int]:
    name = "pooled_attention_float32" if query.dtype == torch.float32 else "pooled_attention"
    return configuration(name, query.device)


def _blocks(query: Tensor, prefix: Tensor, own: Tensor) -> dict[str, Any]:
    """Powers of two, at least 16 for the tensor cores."""
    sizes = {"BLOCK_H": len(query), "BLOCK_S": prefix.shape[1], "BLOCK_T": own.shape[1]}
    blocks: dict[str, Any] = {name: max(triton.next_power_of_2(size), 16) for name, size in sizes.items()}
    blocks["PRECISION"] = "tf32x3" if query.dtype == torch.float32 else "tf32"  # of float32 products only
    return blocks


_attention = torch.library.custom_op("pspg::pooled_attention", run_pooled_attention, mutates_args=())
_attention_backward = torch.library.custom_op(
    "pspg::pooled_attention_backward", run_pooled_attention_backward, mutates_args=()
)


@_attention.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, query.new_empty((query.shape[1], len(query)), dtype=torch.float32)


@_attention_backward.register_fake
def _(d_out: Tensor, query: Tensor, prefix: Tensor, own: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    d_query, d_own = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, own))
    return d_query, d_own, prefix.new_empty(prefix.shape if rest[-1] else (0,))


class _PooledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, prefix: Tensor, own: Tensor, pairs: RaggedPairs, scale: float) -> Tensor:
        index = pairs.prefix_index, pairs.prefix_lengths, pairs.pooled
        out, lse = _attention(query, prefix, own, *index, scale)
        ctx.save_for_backward(query, prefix, own, *index, lse)
        ctx.pairs, ctx.scale = pairs, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        *given, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        # A prefix without a gradient needs no lists of its sequences.
        starts = ctx.pairs.starts if wanted else lse.new_empty((0,), dtype=torch.int64)
        d_query, d_own, d_prefix = _attention_backward(d_out, *given, starts, lse, ctx.scale, wanted)
        return d_query, d_prefix if wanted else None, d_own, None, None


def pooled_attention(query: Tensor, prefix: Tensor, own: Tensor, pairs: RaggedPairs, scale: float) -> Tensor:
    """`BlockOperations.pooled_attention`."""
    return _PooledAttention.apply(query, prefix, own, pairs, scale)

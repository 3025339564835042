"""Attention of suffixes to their cached prefix and to themselves.

A program reads the keys and values of a prefix once for several suffixes. Backward sums what suffixes leave at a prefix
in a fixed order: first within a program, then over programs, without atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import configuration, launch, pin
from ..block_operations import RaggedPairs
from ..eager import attention as eager_attention

pin("suffix_attention", sm_80={"num_warps": 4, "num_stages": 1})
pin("suffix_attention_backward", sm_80={"num_warps": 8, "num_stages": 1})
_SUFFIXES = 8
"""suffixes of one prefix that a program takes, on average"""


@triton.jit
def _attention_kernel(
    qkv,  # (R,T,3W)
    prefix_kv,  # (N,S,2W)
    starts,  # (N+1,)
    prefix_lengths,  # (R,) or None
    out,  # (R,T,W)
    lse,  # (R,heads,T) float32
    suffix_tokens,
    prefix_tokens,
    heads,
    scale,
    splits,
    WIDTH: tl.constexpr,  # of a head: a constant, so that its loads are known to be aligned
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width = heads * WIDTH
    t, s, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    mask_t, mask_d = t < suffix_tokens, d < WIDTH
    column = head * WIDTH + d
    suffix_mask, prefix_mask = mask_t[:, None] & mask_d[None, :], (s < prefix_tokens)[:, None] & mask_d[None, :]
    prefix = prefix_kv + (i.to(tl.int64) * prefix_tokens + s)[:, None] * (2 * width) + column[None, :]
    prefix_k = tl.load(prefix, mask=prefix_mask, other=0)
    prefix_v = tl.load(prefix + width, mask=prefix_mask, other=0)
    causal = (t[:, None] >= t[None, :]) & mask_t[None, :]
    for r in range(tl.load(starts + i) + split, tl.load(starts + i + 1), splits):
        length = prefix_tokens
        if prefix_lengths is not None:
            length = tl.load(prefix_lengths + r)
        row = r * suffix_tokens + t  # int64, as `starts` is
        suffix = qkv + row[:, None] * (3 * width) + column[None, :]
        q = tl.load(suffix, mask=suffix_mask, other=0)
        k = tl.load(suffix + width, mask=suffix_mask, other=0)
        v = tl.load(suffix + 2 * width, mask=suffix_mask, other=0)
        p_prefix = tl.dot(q, tl.trans(prefix_k), input_precision=PRECISION) * scale  # scores, then weights
        p_suffix = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        p_prefix = tl.where((s < length)[None, :], p_prefix, float("-inf"))
        p_suffix = tl.where(causal, p_suffix, float("-inf"))
        row_max = tl.maximum(tl.max(p_prefix, 1), tl.max(p_suffix, 1))
        p_prefix, p_suffix = tl.exp(p_prefix - row_max[:, None]), tl.exp(p_suffix - row_max[:, None])
        row_sum = tl.sum(p_prefix, 1) + tl.sum(p_suffix, 1)
        accumulator = tl.dot(p_prefix.to(v.dtype), prefix_v, input_precision=PRECISION)
        accumulator += tl.dot(p_suffix.to(v.dtype), v, input_precision=PRECISION)
        accumulator = accumulator / row_sum[:, None]
        tl.store(out + row[:, None] * width + column[None, :], accumulator.to(out.dtype.element_ty), mask=suffix_mask)
        lse_offsets = (r * heads + head) * suffix_tokens + t
        tl.store(lse + lse_offsets, row_max + tl.log(row_sum), mask=mask_t)


@triton.jit
def _attention_backward_kernel(
    d_out,  # (R,T,W)
    qkv,  # (R,T,3W)
    prefix_kv,  # (N,S,2W)
    starts,  # (N+1,)
    prefix_lengths,  # (R,) or None
    lse,  # (R,heads,T) float32
    d_qkv,  # (R,T,3W)
    partial,  # (splits,N,S,2W) float32: gradients of prefix_kv, to be summed
    suffix_tokens,
    prefix_tokens,
    heads,
    scale,
    splits,
    WIDTH: tl.constexpr,  # of a head: a constant, so that its loads are known to be aligned
    PREFIX_GRADIENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width = heads * WIDTH
    t, s, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    mask_t, mask_d = t < suffix_tokens, d < WIDTH
    column = head * WIDTH + d
    suffix_mask, prefix_mask = mask_t[:, None] & mask_d[None, :], (s < prefix_tokens)[:, None] & mask_d[None, :]
    prefix_offsets = (i.to(tl.int64) * prefix_tokens + s)[:, None] * (2 * width) + column[None, :]
    prefix_k = tl.load(prefix_kv + prefix_offsets, mask=prefix_mask, other=0)
    prefix_v = tl.load(prefix_kv + prefix_offsets + width, mask=prefix_mask, other=0)
    d_prefix_k = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    d_prefix_v = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    causal = (t[:, None] >= t[None, :]) & mask_t[:, None]
    for r in range(tl.load(starts + i) + split, tl.load(starts + i + 1), splits):
        length = prefix_tokens
        if prefix_lengths is not None:
            length = tl.load(prefix_lengths + r)
        row = r * suffix_tokens + t  # int64, as `starts` is
        suffix_offsets = row[:, None] * (3 * width) + column[None, :]
        q = tl.load(qkv + suffix_offsets, mask=suffix_mask, other=0)
        k = tl.load(qkv + suffix_offsets + width, mask=suffix_mask, other=0)
        v = tl.load(qkv + suffix_offsets + 2 * width, mask=suffix_mask, other=0)
        do = tl.load(d_out + row[:, None] * width + column[None, :], mask=suffix_mask, other=0)
        lse_offsets = (r * heads + head) * suffix_tokens + t
        row_lse = tl.load(lse + lse_offsets, mask=mask_t, other=0)[:, None]
        # Rows beyond the last token have q = do = 0; their weights must be finite, and are 0.
        p_prefix = tl.dot(q, tl.trans(prefix_k), input_precision=PRECISION) * scale - row_lse
        p_suffix = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - row_lse
        p_prefix = tl.where((s < length)[None, :] & mask_t[:, None], tl.exp(p_prefix), 0.0)
        p_suffix = tl.where(causal, tl.exp(p_suffix), 0.0)
        dp_prefix = tl.dot(do, tl.trans(prefix_v), input_precision=PRECISION)
        dp_suffix = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        delta = (tl.sum(p_prefix * dp_prefix, 1) + tl.sum(p_suffix * dp_suffix, 1))[:, None]
        # One part after the other, so that few blocks are alive at a time.
        dp_prefix = (p_prefix * (dp_prefix - delta) * scale).to(q.dtype)
        if PREFIX_GRADIENT:
            d_prefix_v += tl.dot(tl.trans(p_prefix.to(q.dtype)), do, input_precision=PRECISION)
            d_prefix_k += tl.dot(tl.trans(dp_prefix), q, input_precision=PRECISION)
        d_q = tl.dot(dp_prefix, prefix_k, input_precision=PRECISION)
        d_v = tl.dot(tl.trans(p_suffix.to(q.dtype)), do, input_precision=PRECISION)
        tl.store(d_qkv + suffix_offsets + 2 * width, d_v.to(q.dtype), mask=suffix_mask)
        dp_suffix = (p_suffix * (dp_suffix - delta) * scale).to(q.dtype)
        d_k = tl.dot(tl.trans(dp_suffix), q, input_precision=PRECISION)
        tl.store(d_qkv + suffix_offsets + width, d_k.to(q.dtype), mask=suffix_mask)
        d_q += tl.dot(dp_suffix, k, input_precision=PRECISION)
        tl.store(d_qkv + suffix_offsets, d_q.to(q.dtype), mask=suffix_mask)
    if PREFIX_GRADIENT:
        target = partial + split.to(tl.int64) * tl.num_programs(0) * prefix_tokens * 2 * width + prefix_offsets
        tl.store(target, d_prefix_k, mask=prefix_mask)
        tl.store(target + width, d_prefix_v, mask=prefix_mask)


def run_attention(
    qkv: Tensor, prefix_kv: Tensor, starts: Tensor, prefix_lengths: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    """Attention of R suffixes, each to its prefix and causally to itself.

    Args:
        qkv: (R,T,3W) queries, keys and values of the suffixes.
        prefix_kv: (N,S,2W) keys and values of the prefixes.
        starts: (N+1,) suffixes starts[i] to starts[i+1] continue prefix i.
        prefix_lengths: (R,) tokens of its prefix that each suffix sees; None: all.
        heads: they divide W.

    Returns:
        (R,T,W), and the (R,heads,T) float32 log-sum-exp of each query's scores.
    """
    qkv, prefix_kv = qkv.contiguous(), prefix_kv.contiguous()
    suffixes, suffix_tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out = qkv.new_empty((suffixes, suffix_tokens, width))
    lse = qkv.new_empty((suffixes, heads, suffix_tokens), dtype=torch.float32)
    splits, shape = _tiling(qkv, prefix_kv, heads)
    launch(
        _attention_kernel,
        (len(prefix_kv), heads, splits),
        *(qkv, prefix_kv, starts, prefix_lengths, out, lse),
        *(suffix_tokens, prefix_kv.shape[1], heads, (width // heads) ** -0.5, splits),
        **shape,
        **configuration("suffix_attention", qkv.device),
    )
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
    suffix_tokens, width = qkv.shape[1], qkv.shape[2] // 3
    d_qkv = torch.empty_like(qkv)
    splits, shape = _tiling(qkv, prefix_kv, heads)
    partial = prefix_kv.new_empty((splits, *prefix_kv.shape) if prefix_gradient else (0,), dtype=torch.float32)
    launch(
        _attention_backward_kernel,
        (len(prefix_kv), heads, splits),
        *(d_out, qkv, prefix_kv, starts, prefix_lengths, lse, d_qkv, partial),
        *(suffix_tokens, prefix_kv.shape[1], heads, (width // heads) ** -0.5, splits),
        PREFIX_GRADIENT=prefix_gradient,
        **shape,
        **configuration("suffix_attention_backward", qkv.device),
    )
    return d_qkv, partial.sum(0).to(prefix_kv.dtype) if prefix_gradient else prefix_kv.new_empty((0,))


def _tiling(qkv: Tensor, prefix_kv: Tensor, heads: int) -> tuple[int, dict[str, Any]]:
    """Programs that share a prefix's suffixes, and block sizes: powers of two, at least 16 for the tensor cores."""
    suffixes, suffix_tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    sizes = {"BLOCK_T": suffix_tokens, "BLOCK_S": prefix_kv.shape[1], "BLOCK_D": width // heads}
    shape: dict[str, Any] = {name: max(triton.next_power_of_2(size), 16) for name, size in sizes.items()}
    shape["WIDTH"] = width // heads
    shape["PRECISION"] = "tf32x3" if qkv.dtype == torch.float32 else "tf32"  # of float32 products only
    return max(triton.cdiv(suffixes, _SUFFIXES * len(prefix_kv)), 1), shape


_attention = torch.library.custom_op("pspg::suffix_attention", run_attention, mutates_args=())
_attention_backward = torch.library.custom_op(
    "pspg::suffix_attention_backward", run_attention_backward, mutates_args=()
)


@_attention.register_fake
def _(
    qkv: Tensor, prefix_kv: Tensor, starts: Tensor, prefix_lengths: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    suffixes, suffix_tokens, width = qkv.shape
    lse = qkv.new_empty((suffixes, heads, suffix_tokens), dtype=torch.float32)
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
    if qkv.is_cuda and qkv.dtype == torch.float32:  # its backward in tf32x3 spills registers
        return eager_attention(heads, qkv, prefix_kv, pairs)
    return _attention(qkv, prefix_kv, pairs.starts, pairs.prefix_lengths, heads)[0]

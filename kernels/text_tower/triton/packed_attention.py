"""Causal attention of packed texts that train: a program a text and head. Backward is given the input and no more."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import architecture, configuration, launch, pin

pin("packed_attention", sm_80={"num_warps": 4})
MOST_TOKENS, WIDEST_HEAD = {80: 64, 90: 128}, 128
"""of a text, by the oldest architecture whose registers hold it, and of a head: one program has both whole"""


@triton.jit
def _rows_of_text(ends, text):
    """First row of a text, the one behind the text before it."""
    return tl.where(text > 0, tl.load(ends + text - 1, mask=text > 0, other=-1) + 1, 0)


@triton.jit
def _zeros_behind(out, first, rows, width, column, inside, BLOCK_T: tl.constexpr):
    """Rows that belong to no text: nobody reads them, but what is multiplied with them has to be finite."""
    for start in range(first, rows, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        mask = (row < rows)[:, None] & inside[None, :]
        offsets = row[:, None] * width + column[None, :]
        tl.store(out + offsets, tl.zeros(mask.shape, out.dtype.element_ty), mask=mask)


@triton.jit
def _shares(q, k, count, scale, BLOCK_T: tl.constexpr):
    """Softmax of the scores of a text of `count` tokens, each query's over the tokens up to its own."""
    token = tl.arange(0, BLOCK_T)
    seen = (token[None, :] <= token[:, None]) & (token < count)[None, :]
    scores = tl.where(seen, tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634), float("-inf"))
    powers = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def _tokens(first, count, inside, BLOCK_T: tl.constexpr):
    """Rows of a text's tokens (BLOCK_T,1), and which of them and of a head's columns there are."""
    token = tl.arange(0, BLOCK_T)
    return (first + token)[:, None], (token < count)[:, None] & inside[None, :]


@triton.jit
def _queries_keys_values(pointers, width, mask):
    """(BLOCK_T,BLOCK_D) each, of a text and head."""
    q = tl.load(pointers, mask=mask, other=0)
    k = tl.load(pointers + width, mask=mask, other=0)
    return q, k, tl.load(pointers + 2 * width, mask=mask, other=0)


@triton.jit
def _packed_attention_kernel(
    qkv,  # (R,3W)
    ends,  # (N,) int64: last row of each text
    out,  # (R,W)
    rows,
    width,
    texts,
    scale,
    SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    text, head = tl.program_id(0), tl.program_id(1)
    first = _rows_of_text(ends, text)
    part = tl.arange(0, BLOCK_D)
    column, inside = head * SIZE + part, part < SIZE
    if text == texts:
        _zeros_behind(out, first, rows, width, column, inside, BLOCK_T)
    else:
        count = tl.load(ends + text) + 1 - first
        row, mask = _tokens(first, count, inside, BLOCK_T)
        offsets = row * (3 * width) + column[None, :]
        q, k, v = _queries_keys_values(qkv + offsets, width, mask)
        result = tl.dot(_shares(q, k, count, scale, BLOCK_T).to(v.dtype), v)
        tl.store(out + row * width + column[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _packed_attention_backward_kernel(
    d_out,  # (R,W)
    qkv,  # (R,3W)
    ends,  # (N,) int64
    d_qkv,  # (R,3W)
    rows,
    width,
    texts,
    scale,
    SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    text, head = tl.program_id(0), tl.program_id(1)
    first = _rows_of_text(ends, text)
    part = tl.arange(0, BLOCK_D)
    column, inside = head * SIZE + part, part < SIZE
    if text == texts:
        for third in tl.static_range(3):
            _zeros_behind(d_qkv + third * width, first, rows, 3 * width, column, inside, BLOCK_T)
    else:
        count = tl.load(ends + text) + 1 - first
        row, mask = _tokens(first, count, inside, BLOCK_T)
        offsets = row * (3 * width) + column[None, :]
        q, k, v = _queries_keys_values(qkv + offsets, width, mask)
        gradient = tl.load(d_out + row * width + column[None, :], mask=mask, other=0)
        shares = _shares(q, k, count, scale, BLOCK_T)
        d_v = tl.dot(tl.trans(shares.to(v.dtype)), gradient)
        tl.store(d_qkv + 2 * width + offsets, d_v.to(d_qkv.dtype.element_ty), mask=mask)
        d_shares = tl.dot(gradient, tl.trans(v))
        d_scores = shares * (d_shares - tl.sum(shares * d_shares, 1)[:, None]) * scale
        d_scores = d_scores.to(q.dtype)
        tl.store(d_qkv + offsets, tl.dot(d_scores, k).to(d_qkv.dtype.element_ty), mask=mask)
        d_k = tl.dot(tl.trans(d_scores), q)
        tl.store(d_qkv + width + offsets, d_k.to(d_qkv.dtype.element_ty), mask=mask)


def run_packed_attention(qkv: Tensor, ends: Tensor, heads: int, tokens: int) -> Tensor:
    """What each token attends to, (R,W).

    Args:
        qkv: (R,3W) queries, keys and values of packed texts.
        ends: (N,) int64, last row of each text; rows behind the last belong to none, and get zeros.
        heads: W is a multiple of it.
        tokens: of the longest text, at most.
    """
    qkv, ends = qkv.contiguous(), ends.contiguous()
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    sizes, options = _sizes(qkv, ends, heads, tokens)
    launch(_packed_attention_kernel, (len(ends) + 1, heads), qkv, ends, out, *sizes, **options)
    return out


def run_packed_attention_backward(d_out: Tensor, qkv: Tensor, ends: Tensor, heads: int, tokens: int) -> Tensor:
    """Gradient by `qkv`."""
    d_out, qkv, ends = d_out.contiguous(), qkv.contiguous(), ends.contiguous()
    d_qkv = torch.empty_like(qkv)
    sizes, options = _sizes(qkv, ends, heads, tokens)
    launch(_packed_attention_backward_kernel, (len(ends) + 1, heads), d_out, qkv, ends, d_qkv, *sizes, **options)
    return d_qkv


def _sizes(qkv: Tensor, ends: Tensor, heads: int, tokens: int) -> tuple[tuple[Any, ...], dict[str, int]]:
    """Numbers and constants of both kernels; the program behind the last text has the rows of none."""
    width = qkv.shape[1] // 3
    size = width // heads
    block_t, block_d = (max(triton.next_power_of_2(number), 16) for number in (tokens, size))
    options = configuration("packed_attention", qkv.device)
    options["num_warps"] *= 2 if block_t > 64 else 1
    constants = {"SIZE": size, "BLOCK_T": block_t, "BLOCK_D": block_d}
    return (qkv.shape[0], width, len(ends), size**-0.5), {**constants, **options}


_attention = torch.library.custom_op("pspg::packed_attention", run_packed_attention, mutates_args=())
_attention_backward = torch.library.custom_op(
    "pspg::packed_attention_backward", run_packed_attention_backward, mutates_args=()
)


@_attention.register_fake
def _(qkv: Tensor, ends: Tensor, heads: int, tokens: int) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)


@_attention_backward.register_fake
def _(d_out: Tensor, qkv: Tensor, ends: Tensor, heads: int, tokens: int) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, ends, ctx.heads, ctx.tokens = inputs
    ctx.save_for_backward(qkv, ends)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return _attention_backward(d_out, *ctx.saved_tensors, ctx.heads, ctx.tokens), None, None, None


_attention.register_autograd(_backward, setup_context=_save)


def can_attend(qkv: Tensor, heads: int, tokens: int) -> bool:
    """True where the kernels take texts of so many tokens: half precision, and a text and a head that fit."""
    most = max(number for oldest, number in MOST_TOKENS.items() if oldest <= max(architecture(qkv.device), 80))
    fits = tokens <= most and qkv.shape[1] // (3 * heads) <= WIDEST_HEAD
    return fits and qkv.dtype in (torch.bfloat16, torch.float16)


def packed_attention(qkv: Tensor, ends: Tensor, heads: int, tokens: int) -> Tensor:
    """`run_packed_attention` with its gradient."""
    out: Tensor = _attention(qkv, ends, heads, tokens)
    return out

"""Triton kernels for what a frozen tower does between its matrix products.

Attention of tails reads the keys and values of their prefix once for several tails. Backward sums what the tails leave
at a prefix in a fixed order: first within a program, then over programs, without atomics. A LayerNorm comes with the
addition before it, and backward with the residual's gradient: one pass each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..launch import configuration, launch, pin
from .block_operations import Continuation, Passes
from .block_operations import add_norm as eager_add_norm
from .block_operations import attend as eager_attend
from .blocks import mlp
from .reference import TextLayer, TextTower

pin("tail_attention", sm_80={"num_warps": 4, "num_stages": 1})
pin("tail_attention_backward", sm_80={"num_warps": 8, "num_stages": 1})
pin("quick_gelu", sm_80={"BLOCK": 2048, "num_warps": 4})
pin("take_backward", sm_80={"BLOCK": 1024, "num_warps": 4})
_TAILS = 8
"""tails of one prefix that a program takes, on average"""


def add_norm(tower: TextTower, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As `Passes.add_norm`."""
    if delta is None:  # nothing to add, and no room for a kernel to save anything
        return eager_add_norm(tower, x, None, weight, bias)
    total, normal, _ = _add_norm(x, delta, weight, bias, tower.eps)
    return total, normal


def fused_mlp(tower: TextTower, layer: TextLayer, y: Tensor) -> Tensor:
    """As `Passes.mlp`."""
    if tower.activation != "quick_gelu":
        return mlp(tower, layer, y)
    # Of frozen weights autograd keeps no inputs: the hidden layer before its activation is all that is kept.
    hidden = F.linear(y, layer.fc_weight, layer.fc_bias)
    return F.linear(_quick_gelu(hidden), layer.proj_weight, layer.proj_bias)


def attend(heads: int, projected: Tensor, prefix: Tensor, continuation: Continuation) -> Tensor:
    """As `Passes.attend`."""
    if projected.is_cuda and projected.dtype == torch.float32:  # its backward in tf32x3 spills registers
        return eager_attend(heads, projected, prefix, continuation)
    return _tail_attention(projected, prefix, continuation.starts, continuation.lengths, heads)[0]


def of_prefix(table: Tensor, continuation: Continuation) -> Tensor:
    """As `Passes.of_prefix`."""
    return _take(table, continuation.first, None, continuation.starts)


def of_tail(table: Tensor, continuation: Continuation) -> Tensor:
    """As `Passes.of_tail`."""
    return _take(table, continuation.second, *continuation.by_tail)


FUSED = Passes(add_norm, fused_mlp, attend, of_prefix, of_tail)


# ---- x + delta and its LayerNorm


def run_add_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta (…,W), its LayerNorm, and (2,rows) float32 mean and reciprocal standard deviation of each row."""
    x, delta = x.contiguous(), delta.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    total, normal = torch.empty_like(x), torch.empty_like(x)
    statistics = x.new_empty((2, rows), dtype=torch.float32)
    launch(
        _add_norm_kernel,
        (rows,),
        *(x, delta, weight, bias, total, normal, statistics, rows, width, eps),
        **_row(width),
    )
    return total, normal, statistics


def run_add_norm_backward(
    d_total: Tensor, d_normal: Tensor, total: Tensor, statistics: Tensor, weight: Tensor
) -> Tensor:
    """Gradient by x, which is that by delta."""
    d_total, d_normal = d_total.contiguous(), d_normal.contiguous()
    width = total.shape[-1]
    rows = total.numel() // width
    d_x = torch.empty_like(total)
    launch(
        _add_norm_backward_kernel,
        (rows,),
        *(d_total, d_normal, total, statistics, weight, d_x, rows, width),
        **_row(width),
    )
    return d_x


_add_norm = torch.library.custom_op("pspg::add_norm", run_add_norm, mutates_args=())
_add_norm_backward = torch.library.custom_op("pspg::add_norm_backward", run_add_norm_backward, mutates_args=())


def _row(width: int) -> dict[str, int]:
    """A program a row, eight elements a thread: one 128-bit load of a short dtype."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@_add_norm.register_fake
def _(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(x), x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)


@_add_norm_backward.register_fake
def _(d_total: Tensor, d_normal: Tensor, total: Tensor, *_: Tensor) -> Tensor:
    return _like(total)


def _keep_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[0], output[2], inputs[2])
    ctx.mark_non_differentiable(output[2])


def _through_add_norm(ctx: Any, d_total: Tensor, d_normal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    d_x = _add_norm_backward(d_total, d_normal, *ctx.saved_tensors)
    return d_x, d_x, None, None, None


_add_norm.register_autograd(_through_add_norm, setup_context=_keep_add_norm)


@triton.jit
def _add_norm_kernel(
    x, delta, weight, bias, total, normal, statistics, rows, width, eps, BLOCK: tl.constexpr
):  # one row of `width` a program
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    there = column < width
    at = row.to(tl.int64) * width + column
    value = tl.load(x + at, mask=there, other=0).to(tl.float32) + tl.load(delta + at, mask=there, other=0).to(
        tl.float32
    )
    # The statistics are those of what is stored, so that backward finds the same x̂.
    stored = value.to(total.dtype.element_ty)
    tl.store(total + at, stored, mask=there)
    value = stored.to(tl.float32)
    mean = tl.sum(value, 0) / width
    centred = tl.where(there, value - mean, 0.0)
    reciprocal = 1 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    scale = tl.load(weight + column, mask=there, other=0).to(tl.float32)
    shift = tl.load(bias + column, mask=there, other=0).to(tl.float32)
    tl.store(normal + at, (centred * reciprocal * scale + shift).to(normal.dtype.element_ty), mask=there)
    tl.store(statistics + row, mean)
    tl.store(statistics + rows + row, reciprocal)


@triton.jit
def _add_norm_backward_kernel(
    d_total, d_normal, total, statistics, weight, d_x, rows, width, BLOCK: tl.constexpr
):  # one row a program
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    there = column < width
    at = row.to(tl.int64) * width + column
    mean, reciprocal = tl.load(statistics + row), tl.load(statistics + rows + row)
    value = tl.load(total + at, mask=there, other=0).to(tl.float32)
    normal = tl.where(there, (value - mean) * reciprocal, 0.0)
    gradient = tl.load(d_normal + at, mask=there, other=0).to(tl.float32)
    gradient *= tl.load(weight + column, mask=there, other=0).to(tl.float32)
    average, along = tl.sum(gradient, 0) / width, tl.sum(gradient * normal, 0) / width
    residual = tl.load(d_total + at, mask=there, other=0).to(tl.float32)
    d = residual + (gradient - average - normal * along) * reciprocal
    tl.store(d_x + at, d.to(d_x.dtype.element_ty), mask=there)


# ---- QuickGELU(x) = x·σ(1.702 x)


def run_quick_gelu(x: Tensor) -> Tensor:
    """x·σ(1.702 x) of any shape."""
    x, options = x.contiguous(), configuration("quick_gelu", x.device)
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), options["BLOCK"]),)
    launch(_quick_gelu_kernel, grid, *(x, x, out, x.numel()), BACKWARD=False, **options)
    return out


def run_quick_gelu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Gradient by x."""
    gradient, x, options = gradient.contiguous(), x.contiguous(), configuration("quick_gelu", x.device)
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), options["BLOCK"]),)
    launch(_quick_gelu_kernel, grid, *(x, gradient, out, x.numel()), BACKWARD=True, **options)
    return out


_quick_gelu = torch.library.custom_op("pspg::quick_gelu", run_quick_gelu, mutates_args=())
_quick_gelu_backward = torch.library.custom_op("pspg::quick_gelu_backward", run_quick_gelu_backward, mutates_args=())
_quick_gelu.register_fake(_like)


@_quick_gelu_backward.register_fake
def _(gradient: Tensor, x: Tensor) -> Tensor:
    return _like(x)


_quick_gelu.register_autograd(
    lambda ctx, gradient: _quick_gelu_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@triton.jit
def _quick_gelu_kernel(x, gradient, out, count, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    value = tl.load(x + at, mask=there, other=0).to(tl.float32)
    gate = tl.sigmoid(1.702 * value)
    if BACKWARD:
        d = tl.load(gradient + at, mask=there, other=0).to(tl.float32)
        result = d * gate * (1 + 1.702 * value * (1 - gate))
    else:
        result = value * gate
    tl.store(out + at, result.to(out.dtype.element_ty), mask=there)


# ---- rows of a table, whose gradients are summed in a fixed order


def run_take(table: Tensor, index: Tensor, order: Tensor | None, starts: Tensor) -> Tensor:
    """table[index]; `order` and `starts` say who took which row, for backward (`run_take_backward`)."""
    return table.index_select(0, index)


def run_take_backward(gradient: Tensor, order: Tensor | None, starts: Tensor) -> Tensor:
    """Row j is the sum of the rows order[starts[j]] to order[starts[j+1]] of `gradient`; order None: 0, 1, 2 …"""
    gradient = gradient.contiguous()
    rows, size = len(starts) - 1, gradient[:1].numel()
    out = gradient.new_empty((rows, *gradient.shape[1:]))
    options = configuration("take_backward", gradient.device)
    grid = (rows, triton.cdiv(size, options["BLOCK"]))
    launch(_take_backward_kernel, grid, *(gradient, order, starts, out, size), **options)
    return out


_take = torch.library.custom_op("pspg::take", run_take, mutates_args=())
_take_backward = torch.library.custom_op("pspg::take_backward", run_take_backward, mutates_args=())


@_take.register_fake
def _(table: Tensor, index: Tensor, order: Tensor | None, starts: Tensor) -> Tensor:
    return table.new_empty((len(index), *table.shape[1:]))


@_take_backward.register_fake
def _(gradient: Tensor, order: Tensor | None, starts: Tensor) -> Tensor:
    return gradient.new_empty((len(starts) - 1, *gradient.shape[1:]))


def _keep_take(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _through_take(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _take_backward(gradient, *ctx.saved_tensors), None, None, None


_take.register_autograd(_through_take, setup_context=_keep_take)


@triton.jit
def _take_backward_kernel(gradient, order, starts, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < size
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(tl.load(starts + row), tl.load(starts + row + 1)):
        source = k
        if order is not None:
            source = tl.load(order + k)
        total += tl.load(gradient + source * size + column, mask=there, other=0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * size + column, total.to(out.dtype.element_ty), mask=there)


# ---- attention of tails to their prefix and themselves


def run_tail_attention(
    projected: Tensor, prefix: Tensor, starts: Tensor, lengths: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    """Attention of R tails, each to its prefix and causally to itself.

    Args:
        projected: (R,T,3W) queries, keys and values of the tails.
        prefix: (N,S,2W) keys and values of the prefixes.
        starts: (N+1,) tails starts[i] to starts[i+1] continue prefix i.
        lengths: (R,) tokens of each tail's prefix that it sees; None: all.
        heads: they divide W.

    Returns:
        (R,T,W), and (R,heads,T) float32 logarithms of the softmax's denominators.
    """
    projected, prefix = projected.contiguous(), prefix.contiguous()
    tails, tokens, width = projected.shape[0], projected.shape[1], projected.shape[2] // 3
    out = projected.new_empty((tails, tokens, width))
    denominators = projected.new_empty((tails, heads, tokens), dtype=torch.float32)
    splits, shape = _tiling(projected, prefix, heads)
    launch(
        _tail_attention_kernel,
        (len(prefix), heads, splits),
        *(projected, prefix, starts, lengths, out, denominators),
        *(tokens, prefix.shape[1], heads, (width // heads) ** -0.5, splits),
        **shape,
        **configuration("tail_attention", projected.device),
    )
    return out, denominators


def run_tail_attention_backward(
    gradient: Tensor,
    projected: Tensor,
    prefix: Tensor,
    starts: Tensor,
    lengths: Tensor | None,
    denominators: Tensor,
    heads: int,
    by_prefix: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients by `projected` and, if asked for, `prefix` (else an empty tensor)."""
    gradient, projected, prefix = gradient.contiguous(), projected.contiguous(), prefix.contiguous()
    tokens, width = projected.shape[1], projected.shape[2] // 3
    d_projected = torch.empty_like(projected)
    splits, shape = _tiling(projected, prefix, heads)
    partial = prefix.new_empty((splits, *prefix.shape) if by_prefix else (0,), dtype=torch.float32)
    launch(
        _tail_attention_backward_kernel,
        (len(prefix), heads, splits),
        *(gradient, projected, prefix, starts, lengths, denominators, d_projected, partial),
        *(tokens, prefix.shape[1], heads, (width // heads) ** -0.5, splits),
        BY_PREFIX=by_prefix,
        **shape,
        **configuration("tail_attention_backward", projected.device),
    )
    return d_projected, partial.sum(0).to(prefix.dtype) if by_prefix else prefix.new_empty((0,))


def _tiling(projected: Tensor, prefix: Tensor, heads: int) -> tuple[int, dict[str, Any]]:
    """Programs that share a prefix's tails, and block sizes: powers of two, at least 16 for the tensor cores."""
    tails, tokens, width = projected.shape[0], projected.shape[1], projected.shape[2] // 3
    sizes = {"BLOCK_T": tokens, "BLOCK_S": prefix.shape[1], "BLOCK_D": width // heads}
    shape: dict[str, Any] = {name: max(triton.next_power_of_2(size), 16) for name, size in sizes.items()}
    shape["WIDTH"] = width // heads
    shape["PRECISION"] = "tf32x3" if projected.dtype == torch.float32 else "tf32"  # of float32 products only
    return max(triton.cdiv(tails, _TAILS * len(prefix)), 1), shape


_tail_attention = torch.library.custom_op("pspg::tail_attention", run_tail_attention, mutates_args=())
_tail_attention_backward = torch.library.custom_op(
    "pspg::tail_attention_backward", run_tail_attention_backward, mutates_args=()
)


@_tail_attention.register_fake
def _(projected: Tensor, prefix: Tensor, starts: Tensor, lengths: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
    tails, tokens, width = projected.shape
    denominators = projected.new_empty((tails, heads, tokens), dtype=torch.float32)
    return projected.new_empty((tails, tokens, width // 3)), denominators


@_tail_attention_backward.register_fake
def _(gradient: Tensor, projected: Tensor, prefix: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _like(projected), _like(prefix) if rest[-1] else prefix.new_empty((0,))


def _keep_tail_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.heads = inputs[4]
    ctx.mark_non_differentiable(output[1])


def _through_tail_attention(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    by_prefix = ctx.needs_input_grad[1]
    d_projected, d_prefix = _tail_attention_backward(gradient, *ctx.saved_tensors, ctx.heads, by_prefix)
    return d_projected, d_prefix if by_prefix else None, None, None, None


_tail_attention.register_autograd(_through_tail_attention, setup_context=_keep_tail_attention)


@triton.jit
def _tail_attention_kernel(
    projected,  # (R,T,3W)
    prefix,  # (N,S,2W)
    starts,  # (N+1,)
    lengths,  # (R,) or None
    out,  # (R,T,W)
    denominators,  # (R,heads,T) float32
    tokens,
    seen,
    heads,
    factor,
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
    real_t, real_d = t < tokens, d < WIDTH
    column = head * WIDTH + d
    own_mask, shared_mask = real_t[:, None] & real_d[None, :], (s < seen)[:, None] & real_d[None, :]
    shared = prefix + (i.to(tl.int64) * seen + s)[:, None] * (2 * width) + column[None, :]
    shared_k = tl.load(shared, mask=shared_mask, other=0)
    shared_v = tl.load(shared + width, mask=shared_mask, other=0)
    causal = (t[:, None] >= t[None, :]) & real_t[None, :]
    for r in range(tl.load(starts + i) + split, tl.load(starts + i + 1), splits):
        length = seen
        if lengths is not None:
            length = tl.load(lengths + r)
        row = r * tokens + t  # int64, as `starts` is
        own = projected + row[:, None] * (3 * width) + column[None, :]
        q = tl.load(own, mask=own_mask, other=0)
        k = tl.load(own + width, mask=own_mask, other=0)
        v = tl.load(own + 2 * width, mask=own_mask, other=0)
        to_shared = tl.dot(q, tl.trans(shared_k), input_precision=PRECISION) * factor
        to_own = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        to_shared = tl.where((s < length)[None, :], to_shared, float("-inf"))
        to_own = tl.where(causal, to_own, float("-inf"))
        largest = tl.maximum(tl.max(to_shared, 1), tl.max(to_own, 1))
        to_shared, to_own = tl.exp(to_shared - largest[:, None]), tl.exp(to_own - largest[:, None])
        total = tl.sum(to_shared, 1) + tl.sum(to_own, 1)
        mixed = tl.dot(to_shared.to(v.dtype), shared_v, input_precision=PRECISION)
        mixed += tl.dot(to_own.to(v.dtype), v, input_precision=PRECISION)
        mixed = mixed / total[:, None]
        tl.store(out + row[:, None] * width + column[None, :], mixed.to(out.dtype.element_ty), mask=own_mask)
        at = (r * heads + head) * tokens + t
        tl.store(denominators + at, largest + tl.log(total), mask=real_t)


@triton.jit
def _tail_attention_backward_kernel(
    gradient,  # (R,T,W)
    projected,  # (R,T,3W)
    prefix,  # (N,S,2W)
    starts,  # (N+1,)
    lengths,  # (R,) or None
    denominators,  # (R,heads,T) float32
    d_projected,  # (R,T,3W)
    partial,  # (splits,N,S,2W) float32
    tokens,
    seen,
    heads,
    factor,
    splits,
    WIDTH: tl.constexpr,  # of a head: a constant, so that its loads are known to be aligned
    BY_PREFIX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width = heads * WIDTH
    t, s, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    real_t, real_d = t < tokens, d < WIDTH
    column = head * WIDTH + d
    own_mask, shared_mask = real_t[:, None] & real_d[None, :], (s < seen)[:, None] & real_d[None, :]
    at_shared = (i.to(tl.int64) * seen + s)[:, None] * (2 * width) + column[None, :]
    shared_k = tl.load(prefix + at_shared, mask=shared_mask, other=0)
    shared_v = tl.load(prefix + at_shared + width, mask=shared_mask, other=0)
    d_shared_k = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    d_shared_v = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    causal = (t[:, None] >= t[None, :]) & real_t[:, None]
    for r in range(tl.load(starts + i) + split, tl.load(starts + i + 1), splits):
        length = seen
        if lengths is not None:
            length = tl.load(lengths + r)
        row = r * tokens + t  # int64, as `starts` is
        at_own = row[:, None] * (3 * width) + column[None, :]
        q = tl.load(projected + at_own, mask=own_mask, other=0)
        k = tl.load(projected + at_own + width, mask=own_mask, other=0)
        v = tl.load(projected + at_own + 2 * width, mask=own_mask, other=0)
        g = tl.load(gradient + row[:, None] * width + column[None, :], mask=own_mask, other=0)
        at = (r * heads + head) * tokens + t
        denominator = tl.load(denominators + at, mask=real_t, other=0)[:, None]
        # Rows beyond the last token have q = g = 0; their weights must be finite, and are 0.
        to_shared = tl.dot(q, tl.trans(shared_k), input_precision=PRECISION) * factor - denominator
        to_own = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor - denominator
        to_shared = tl.where((s < length)[None, :] & real_t[:, None], tl.exp(to_shared), 0.0)
        to_own = tl.where(causal, tl.exp(to_own), 0.0)
        d_to_shared = tl.dot(g, tl.trans(shared_v), input_precision=PRECISION)
        d_to_own = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        average = (tl.sum(to_shared * d_to_shared, 1) + tl.sum(to_own * d_to_own, 1))[:, None]
        # One part after the other, so that few blocks are alive at a time.
        d_to_shared = (to_shared * (d_to_shared - average) * factor).to(q.dtype)
        if BY_PREFIX:
            d_shared_v += tl.dot(tl.trans(to_shared.to(q.dtype)), g, input_precision=PRECISION)
            d_shared_k += tl.dot(tl.trans(d_to_shared), q, input_precision=PRECISION)
        d_q = tl.dot(d_to_shared, shared_k, input_precision=PRECISION)
        d_v = tl.dot(tl.trans(to_own.to(q.dtype)), g, input_precision=PRECISION)
        tl.store(d_projected + at_own + 2 * width, d_v.to(q.dtype), mask=own_mask)
        d_to_own = (to_own * (d_to_own - average) * factor).to(q.dtype)
        d_k = tl.dot(tl.trans(d_to_own), q, input_precision=PRECISION)
        tl.store(d_projected + at_own + width, d_k.to(q.dtype), mask=own_mask)
        d_q += tl.dot(d_to_own, k, input_precision=PRECISION)
        tl.store(d_projected + at_own, d_q.to(q.dtype), mask=own_mask)
    if BY_PREFIX:
        target = partial + split.to(tl.int64) * tl.num_programs(0) * seen * 2 * width + at_shared
        tl.store(target, d_shared_k, mask=shared_mask)
        tl.store(target + width, d_shared_v, mask=shared_mask)

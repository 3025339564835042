"""Block operations in torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .block_operations import BlockOperations, RaggedPairs, Stream
from .reference import TextLayer, TextTower, layer_norm

QUICK = 1.702
"""QuickGELU(x) = x·sigmoid(1.702 x) = silu(1.702 x) / 1.702."""


def add_norm(tower: TextTower, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`BlockOperations.add_norm`."""
    x = x if delta is None else x + delta
    return x, layer_norm(tower, x, weight, bias)


def mlp(tower: TextTower, layer: TextLayer, y: Tensor) -> Tensor:
    """`BlockOperations.mlp`."""
    quick = tower.activation == "quick_gelu"
    return _MLP.apply(y, layer.fc_weight, layer.fc_bias, layer.proj_weight, layer.proj_bias, quick)


def attention(heads: int, qkv: Tensor, prefix_kv: Tensor, pairs: RaggedPairs) -> Tensor:
    """`BlockOperations.attention`."""
    if qkv.device.type == "cpu" and qkv.dtype == prefix_kv.dtype:
        mask = torch.zeros(pairs.mask.shape, dtype=qkv.dtype).masked_fill_(~pairs.mask, -torch.inf)
        return _Attention.apply(heads, qkv, prefix_kv, pairs.prefix_index, pairs.starts, mask)
    return attend(heads, qkv, prefix_kv.index_select(0, pairs.prefix_index), pairs.mask)


def attend(heads: int, qkv: Tensor, prefix_kv: Tensor, mask: Tensor) -> Tensor:
    """`attention` where each sequence has the keys and values of its prefix, (R,S,2W); `mask` as `RaggedPairs.mask`."""
    width = qkv.shape[-1] // 3
    queries, own = qkv.split([width, 2 * width], dim=-1)
    keys_values = torch.cat([prefix_kv, own], dim=1)
    q = queries.unflatten(-1, (heads, -1)).transpose(1, 2)
    k, v = keys_values.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def pooled_norm(
    tower: TextTower, stream: Stream, weight: Tensor, bias: Tensor, pairs: RaggedPairs
) -> tuple[Tensor, Tensor, Tensor]:
    """`BlockOperations.pooled_norm`."""
    x, y = add_norm(tower, stream.x, stream.delta, weight, bias)
    return pairs.pool(x), pairs.pool(y), y


def pooled_attention(query: Tensor, prefix: Tensor, own: Tensor, pairs: RaggedPairs, scale: float) -> Tensor:
    """`BlockOperations.pooled_attention`."""
    seen = torch.cat([prefix.index_select(0, pairs.prefix_index), own], dim=1)[:, None]
    query = query.transpose(0, 1)[:, None]
    mean = F.scaled_dot_product_attention(query, seen, seen, attn_mask=pairs.pooled_mask, scale=scale)
    return mean[:, 0].transpose(0, 1)


def gather_suffix(table: Tensor, pairs: RaggedPairs) -> Tensor:
    """`BlockOperations.gather_suffix`."""
    return table.index_select(0, pairs.suffix_index)


def products(tower: TextTower, x: Tensor) -> None:
    """`BlockOperations.products`: on a CPU a pass of LayerNorm costs less than the folded product's wider epilogue."""


# Two inputs of LayerNorms, queries, keys and values of the prefix and the token, and the attended value.
EAGER = BlockOperations(10, add_norm, mlp, attention, pooled_norm, pooled_attention, gather_suffix, products)


class _Attention(torch.autograd.Function):
    """`attention` on a CPU, where the passes around it cost as much as itself: each number is copied once.

    Autograd would join the gradients of keys and values, then of these and the queries, and add up each sequence's
    part of a prefix by its index; sequences of one prefix are consecutive, and their sum is one reduction.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: int, qkv: Tensor, prefix_kv: Tensor, index: Tensor, starts: Tensor, mask: Tensor
    ) -> Tensor:
        (count, own, _), before = qkv.shape, prefix_kv.shape[1]
        queries, keys_values = qkv.split([qkv.shape[-1] // 3, 2 * qkv.shape[-1] // 3], dim=-1)
        seen = qkv.new_empty(count, before + own, keys_values.shape[-1])
        torch.index_select(prefix_kv, 0, index, out=seen[:, :before])
        seen[:, before:] = keys_values
        q = queries.unflatten(-1, (heads, -1)).transpose(1, 2)
        k, v = seen.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
        ctx.save_for_backward(q, k, v, out, sums, starts, mask)
        ctx.before = before
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums, starts, mask = ctx.saved_tensors
        count, heads, own, size = q.shape
        gradient = gradient.unflatten(-1, (heads, size)).transpose(1, 2)
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, q, k, v, out, sums, 0.0, False, attn_mask=mask
        )
        d_q, d_k, d_v = (part.transpose(1, 2) for part in parts)
        d_qkv = gradient.new_empty(count, own, 3, heads, size)
        for number, part in enumerate((d_q, d_k[:, ctx.before :], d_v[:, ctx.before :])):
            d_qkv[:, :, number] = part
        bounds = starts.tolist()
        d_prefix = gradient.new_empty(len(bounds) - 1, ctx.before, 2, heads, size)
        for prefix, (start, stop) in enumerate(pairwise(bounds)):
            for number, part in enumerate((d_k, d_v)):
                torch.sum(part[start:stop, : ctx.before], dim=0, out=d_prefix[prefix, :, number])
        return None, d_qkv.flatten(2), d_prefix.flatten(2), None, None, None


class _MLP(torch.autograd.Function):
    """MLP of a block with input gradients only; it keeps the hidden layer before its activation and nothing else.

    With QuickGELU the hidden layer is scaled by 1.702 within the products, so that the activation is one pass of silu;
    the two scales cancel in backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor, quick: bool) -> Tensor:
        rows = x.flatten(0, -2)
        if quick:
            hidden = torch.addmm(b_fc, rows, w_fc.T, beta=QUICK, alpha=QUICK)
            out = torch.addmm(b_proj, F.silu(hidden), w_proj.T, alpha=1 / QUICK)
        else:
            hidden = torch.addmm(b_fc, rows, w_fc.T)
            out = torch.addmm(b_proj, F.gelu(hidden), w_proj.T)
        ctx.save_for_backward(hidden, w_fc, w_proj)
        ctx.quick = quick
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, w_fc, w_proj = ctx.saved_tensors
        activated = gradient.flatten(0, -2) @ w_proj
        backward = torch.ops.aten.silu_backward if ctx.quick else torch.ops.aten.gelu_backward
        return (backward(activated, hidden) @ w_fc).view(gradient.shape), None, None, None, None, None

"""Block operations in torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .block_operations import BlockOperations, RaggedPairs
from .reference import TextLayer, TextTower, layer_norm

_QUICK = 1.702
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
    width = qkv.shape[-1] // 3
    queries, own = qkv.split([width, 2 * width], dim=-1)
    keys_values = torch.cat([prefix_kv.index_select(0, pairs.prefix_index), own], dim=1)
    q = queries.unflatten(-1, (heads, -1)).transpose(1, 2)
    k, v = keys_values.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=pairs.mask).transpose(1, 2).flatten(2)


def gather_prefix(table: Tensor, pairs: RaggedPairs) -> Tensor:
    """`BlockOperations.gather_prefix`."""
    return table.index_select(0, pairs.prefix_index)


def gather_suffix(table: Tensor, pairs: RaggedPairs) -> Tensor:
    """`BlockOperations.gather_suffix`."""
    return table.index_select(0, pairs.suffix_index)


def products(tower: TextTower, x: Tensor) -> None:
    """`BlockOperations.products`: on a CPU a pass of LayerNorm costs less than the folded product's wider epilogue."""


EAGER = BlockOperations(add_norm, mlp, attention, gather_prefix, gather_suffix, products)


class _MLP(torch.autograd.Function):
    """MLP of a block with input gradients only; it keeps the hidden layer before its activation and nothing else.

    With QuickGELU the hidden layer is scaled by 1.702 within the products, so that the activation is one pass of silu;
    the two scales cancel in backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor, quick: bool) -> Tensor:
        rows = x.flatten(0, -2)
        if quick:
            hidden = torch.addmm(b_fc, rows, w_fc.T, beta=_QUICK, alpha=_QUICK)
            out = torch.addmm(b_proj, F.silu(hidden), w_proj.T, alpha=1 / _QUICK)
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

"""The halves of a frozen block made of products with epilogues; gradients reach activations, never weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..block_operations import Products, Stream
from ..folding import folded_layer
from ..reference import TextLayer, TextTower
from . import products
from .add_norm import add_norm, add_norm_backward
from .quick_gelu import mlp as mlp_in_passes


class _NormLinear(torch.autograd.Function):
    """x and the linear layer of its LayerNorm, so that both gradients of x meet in one pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, moments: Tensor, weight: Tensor, sums: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        rows = x.flatten(0, -2).contiguous()
        out, _, statistics = products.linear(rows, weight, moments, sums, bias, eps, "out")
        ctx.save_for_backward(x, statistics, weight)
        return x, out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor | None, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return d_x, None, None, None, None, None
        x, statistics, weight = ctx.saved_tensors
        d_x = torch.zeros_like(x) if d_x is None else d_x
        return add_norm_backward(d_x, d_out @ weight, x, statistics, None), None, None, None, None, None


class _Rest(torch.autograd.Function):
    """x + attended·W_oᵀ + b_o, and to that the MLP of its LayerNorm; with the moments of the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, attended: Tensor, layer: TextLayer, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        fc = folded_layer(layer).fc
        residual, attended = (t.flatten(0, -2).contiguous() for t in (x, attended))
        middle, moments = products.add_linear(attended, layer.out_proj_weight, layer.out_proj_bias, residual)
        kind = "both" if any(ctx.needs_input_grad) else "activated"
        hidden, activated, statistics = products.linear(middle, fc.weight, moments, fc.sums, fc.bias, eps, kind)
        out, moments = products.add_linear(activated, layer.proj_weight, layer.proj_bias, middle)
        ctx.save_for_backward(middle, statistics, hidden)
        ctx.layer, ctx.tiles = layer, products.tiles()
        ctx.mark_non_differentiable(moments)
        ctx.set_materialize_grads(False)  # or zeros are written for the moments
        return out.view(x.shape), moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        middle, statistics, hidden = ctx.saved_tensors
        layer, fc, d = ctx.layer, folded_layer(ctx.layer).fc, gradient.flatten(0, -2).contiguous()
        with products.use(tiles=ctx.tiles):
            d_hidden, row_sums = products.activation_backward(d, layer.proj_weight, hidden, fc.sums, fc.bias)
            d_x = products.norm_backward(d_hidden, fc.weight, row_sums, statistics, middle, d)
        return d_x.view(gradient.shape), (d_x @ layer.out_proj_weight).view(gradient.shape), None, None


class _MLP(torch.autograd.Function):
    """MLP of a normalised input, QuickGELU and its derivative within the products."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, layer: TextLayer) -> Tensor:
        rows = y.flatten(0, -2).contiguous()
        kind = "both" if ctx.needs_input_grad[0] else "activated"
        hidden, activated, _ = products.linear(rows, layer.fc_weight, None, None, layer.fc_bias, 0.0, kind)
        ctx.save_for_backward(hidden)
        ctx.layer, ctx.tiles = layer, products.tiles()
        return F.linear(activated, layer.proj_weight, layer.proj_bias).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layer, d = ctx.layer, gradient.flatten(0, -2).contiguous()
        with products.use(tiles=ctx.tiles):
            d_hidden, _ = products.activation_backward(d, layer.proj_weight, *ctx.saved_tensors, None, None)
        return (d_hidden @ layer.fc_weight).view(gradient.shape), None


def mlp(tower: TextTower, layer: TextLayer, y: Tensor) -> Tensor:
    """`BlockOperations.mlp`."""
    if tower.activation != "quick_gelu" or products.choose(y) == "library":
        return mlp_in_passes(tower, layer, y)
    return _MLP.apply(y, layer)


def _project(tower: TextTower, layer: TextLayer, stream: Stream) -> tuple[Stream, Tensor]:
    if stream.moments is None:  # it does not come from a product
        x, y = add_norm(tower, stream.x, stream.delta, layer.ln_1_weight, layer.ln_1_bias)
        return Stream(x), F.linear(y, layer.in_proj_weight, layer.in_proj_bias)
    x, qkv = _NormLinear.apply(stream.x, stream.moments, *folded_layer(layer).qkv, tower.eps)
    return Stream(x), qkv


def _finish(tower: TextTower, layer: TextLayer, stream: Stream, attended: Tensor) -> Stream:
    x, moments = _Rest.apply(stream.total(), attended, layer, tower.eps)
    return Stream(x, None, moments)


_FOLDED = Products(_project, _finish)


def block_products(tower: TextTower, x: Tensor) -> Products | None:
    """`BlockOperations.products`."""
    return _FOLDED if tower.activation == "quick_gelu" and products.choose(x) == "folded" else None

"""LayerNorm folded into the product that reads it, forward and backward; exact in real arithmetic (MATH.md, 3.7)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from ..precision import at_least_fp32
from .block_operations import Products, Stream
from .reference import TextLayer, TextTower


class FoldedLinear(NamedTuple):
    """A linear layer (N,W) on a normalised input, as one on the input itself."""

    weight: Tensor
    """(N,W): weight ⊙ γ, in the weight's dtype"""
    sums: Tensor
    """(N,) sum of each row of it as it is stored, float32 or better"""
    bias: Tensor
    """(N,) weight · β + bias, float32 or better"""


class FoldedLayer(NamedTuple):
    """The two products of a block that read a LayerNorm."""

    qkv: FoldedLinear
    """(3W,W)"""
    fc: FoldedLinear
    """(M,W)"""


def fold(norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> FoldedLinear:
    """The affine part of a LayerNorm (W,) in the weights (N,W) and bias (N,) of the linear layer after it."""
    wide = at_least_fp32(weight).dtype
    # The sums are those of the rounded weights: they take away exactly what a row's mean adds to the product.
    scaled = (weight.double() * norm_weight.double()).to(weight.dtype)
    shifted = weight.double() @ norm_bias.double() + bias.double()
    return FoldedLinear(scaled, scaled.double().sum(1).to(wide), shifted.to(wide))


_folded: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # in_proj_weight → (its sources as they were, FoldedLayer)


def folded_layer(layer: TextLayer) -> FoldedLayer:
    """A block's folded products; made once for as long as its weights live and stay as they are."""
    first = (layer.ln_1_weight, layer.ln_1_bias, layer.in_proj_weight, layer.in_proj_bias)
    second = (layer.ln_2_weight, layer.ln_2_bias, layer.fc_weight, layer.fc_bias)
    stamp = tuple((id(t), None if t.is_inference() else t._version) for t in (*first, *second))
    known = _folded.get(layer.in_proj_weight)
    if known is None or known[0] != stamp:
        with torch.no_grad():
            known = stamp, FoldedLayer(fold(*first), fold(*second))
        _folded[layer.in_proj_weight] = known
    return known[1]


class _NormLinear(torch.autograd.Function):
    """LN(x) W^T + b from x, and backward the sums that LN' needs from the result, before the product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sums: Tensor, bias: Tensor, eps: float) -> Tensor:
        wide = at_least_fp32(x)
        variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
        r = (variance + eps).rsqrt()
        # The product is rounded after the mean's part is taken away, as a kernel does in its epilogue.
        out = (r * (wide @ weight.to(wide.dtype).T) - r * mean * sums + bias).to(x.dtype)
        ctx.save_for_backward(x, mean, r, out, weight, sums, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, r, out, weight, sums, bias = ctx.saved_tensors
        width, d = x.shape[-1], at_least_fp32(gradient)
        average = (d @ sums)[..., None] / width
        along = (d * (out - bias)).sum(-1, keepdim=True) / width
        d_x = r * (d @ weight.to(d.dtype) - average - (x - mean) * r * along)
        return d_x.to(x.dtype), None, None, None, None


def norm_linear(x: Tensor, folded: FoldedLinear, eps: float) -> Tensor:
    """Linear layer of the LayerNorm of x (…,W) → (…,N), input gradients only."""
    return _NormLinear.apply(x, *folded, eps)


def _project(tower: TextTower, layer: TextLayer, stream: Stream) -> tuple[Stream, Tensor]:
    x = stream.total()
    return Stream(x), norm_linear(x, folded_layer(layer).qkv, tower.eps)


def _finish(tower: TextTower, layer: TextLayer, stream: Stream, attended: Tensor) -> Stream:
    x = stream.total() + F.linear(attended, layer.out_proj_weight, layer.out_proj_bias)
    hidden = norm_linear(x, folded_layer(layer).fc, tower.eps)
    hidden = hidden * torch.sigmoid(1.702 * hidden) if tower.activation == "quick_gelu" else F.gelu(hidden)
    return Stream(x + F.linear(hidden, layer.proj_weight, layer.proj_bias))


FOLDED = Products(_project, _finish)
"""The products of a block in torch with both LayerNorms folded: what kernels are compared with."""

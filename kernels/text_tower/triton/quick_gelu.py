"""QuickGELU(x) = x·σ(1.702 x), forward and backward, and the MLP around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...launch import configuration, launch, pin
from ...primitives import follow
from ..eager import mlp as eager_mlp
from ..reference import TextLayer, TextTower

pin("quick_gelu", sm_80={"BLOCK": 2048, "num_warps": 4})


@triton.jit
def _quick_gelu_kernel(
    x,  # (count,)
    gradient,  # (count,), read if BACKWARD
    out,  # (count,): the value, or the gradient by x if BACKWARD
    count,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    value = tl.load(x + offsets, mask=mask, other=0).to(tl.float32)
    gate = tl.sigmoid(1.702 * value)
    if BACKWARD:
        d = tl.load(gradient + offsets, mask=mask, other=0).to(tl.float32)
        result = d * gate * (1 + 1.702 * value * (1 - gate))
    else:
        result = value * gate
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)


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


@_quick_gelu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_quick_gelu_backward.register_fake
def _(gradient: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_quick_gelu.register_autograd(
    lambda ctx, gradient: _quick_gelu_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def mlp(tower: TextTower, layer: TextLayer, y: Tensor) -> Tensor:
    """`BlockOperations.mlp`."""
    if tower.activation != "quick_gelu":
        return eager_mlp(tower, layer, y)
    # Of frozen weights autograd keeps no inputs: the hidden layer before its activation is all that is kept.
    hidden = F.linear(y, layer.fc_weight, layer.fc_bias)
    return F.linear(_quick_gelu(hidden), layer.proj_weight, layer.proj_bias)

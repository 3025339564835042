"""Weights that only enter products, in autocast's dtype: all by one launch a step, and so their gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pspg.kernels.foreach import cast_all
from pspg.kernels.precision import compute_dtype


class CastWeights:
    """What autocast makes of parameters one by one, each with its gradient: the same numbers.

    Gradients reach all parameters at once, when the last of the cast weights has its own.

    Args:
        parameters: each enters nothing but convolutions and matrix products.
        like: a tensor on the device whose autocast counts; where that is off the parameters stay as they are.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], like: Tensor) -> None:
        dtype = compute_dtype(like)
        given = [weight for weight in parameters if weight.dtype == torch.float32 != dtype]
        cast = _Cast.apply(dtype, *given) if given else ()
        self._cast: dict[int, Tensor] = {id(weight): one for weight, one in zip(given, cast, strict=True)}

    def of(self, parameter: Tensor) -> Tensor:
        """What to compute with in place of a parameter."""
        return self._cast.get(id(parameter), parameter)


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [weight.dtype for weight in weights]
        ctx.set_materialize_grads(False)  # or zeros are written for weights that nothing has read
        return tuple(cast_all(weights, [dtype] * len(weights)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [number for number, gradient in enumerate(gradients) if gradient is not None]
        wide = cast_all([g for g in gradients if g is not None], [ctx.dtypes[number] for number in there])
        found = dict(zip(there, wide, strict=True))
        return None, *(found.get(number) for number in range(len(gradients)))


def text_products(clip: Any) -> list[nn.Parameter]:
    """Parameters of a CLIP's text tower that only enter products in `encode_tokens`."""
    blocks = clip.transformer.resblocks
    attention = [block.attn for block in blocks]
    found = [clip.text_projection, *(weight for one in attention for weight in (one.in_proj_weight, one.in_proj_bias))]
    layers = [layer for block in blocks for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj)]
    return found + [parameter for layer in layers for parameter in layer.parameters()]

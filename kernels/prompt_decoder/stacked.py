"""The parameters of G decoders of one kind on a leading dimension: one product does the work of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..foreach import cast_all, copy_all
from .inputs import Decoder


class Stacked:
    """Stacks parameters and casts each once: those that are named all together, others as they are asked for.

    Args:
        decoders: G decoders with the same names and shapes.
        dtype: of the products; norms stay in float32 or better.
        cast: parameters that will be wanted in `dtype`.
        raw: parameters that will be wanted in their own dtype.
    """

    def __init__(
        self, decoders: Sequence[Decoder], dtype: torch.dtype, *, cast: Sequence[str] = (), raw: Sequence[str] = ()
    ) -> None:
        self._decoders, self._dtype = decoders, dtype
        self._found: dict[tuple[str, torch.dtype | None], Tensor] = {}
        keys = [(name, dtype) for name in cast] + [(name, None) for name in raw]
        if keys:
            parts = [decoder[name] for name, _ in keys for decoder in decoders]
            stacks = _StackAll.apply([wanted for _, wanted in keys], *parts)
            self._found.update(zip(keys, stacks, strict=True))

    def __getitem__(self, name: str) -> Tensor:
        """(G,…) in the dtype of the products."""
        return self._get(name, self._dtype)

    def raw(self, name: str) -> Tensor:
        """(G,…) in the parameters' own dtype."""
        return self._get(name, None)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x (G,R,I) through the linear layers of that name, (G,R,O)."""
        return affine(x, self[f"{name}.weight"], self[f"{name}.bias"])

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        """x (G,R,H), in its own dtype."""
        scale, shift = (self._get(f"{name}.{part}", x.dtype)[:, None] for part in ("weight", "bias"))
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), scale)

    def self_attention(self, name: str, x: Tensor, heads: int) -> Tensor:
        """Multi-head attention of the rows of x (G,R,H) to one another, (G,R,H)."""
        qkv = affine(x, self[f"{name}.in_proj_weight"], self[f"{name}.in_proj_bias"])
        return self.attend(name, *(split(part, heads) for part in qkv.chunk(3, dim=-1)))

    def attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        """Projected heads (G,heads,rows,H/heads) to (G,R,H), of all keys or of those `present` (keys,)."""
        mask = None if present is None else present[None]
        return self.linear(f"{name}.out_proj", merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))

    def _get(self, name: str, dtype: torch.dtype | None) -> Tensor:
        if (name, dtype) not in self._found:
            stacked = torch.stack([decoder[name] for decoder in self._decoders])
            self._found[name, dtype] = stacked if dtype is None else stacked.to(dtype)
        return self._found[name, dtype]


class _StackAll(torch.autograd.Function):
    """Stack groups of G tensors, in other dtypes where these are given, in one launch; backward takes another."""

    @staticmethod
    def forward(ctx: Any, dtypes: Sequence[torch.dtype | None], *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes, ctx.count = [part.dtype for part in parts], len(parts) // len(dtypes)
        groups = [parts[start : start + ctx.count] for start in range(0, len(parts), ctx.count)]
        stacks = [
            group[0].new_empty(len(group), *group[0].shape, dtype=dtype or group[0].dtype)
            for group, dtype in zip(groups, dtypes, strict=True)
        ]
        copy_all([row for stack in stacks for row in stack], parts)
        return tuple(stacks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # Contiguous, or a launch would take one tensor at a time.
        rows = [
            row
            for gradient in gradients
            for row in ([None] * ctx.count if gradient is None else gradient.contiguous().unbind())
        ]
        numbers = [number for number, row in enumerate(rows) if row is not None]
        found = cast_all([row for row in rows if row is not None], [ctx.dtypes[number] for number in numbers])
        for number, row in zip(numbers, found, strict=True):
            rows[number] = row
        return None, *rows


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (G,R,I) · weightᵀ (G,O,I) + bias (G,O), one product a decoder."""
    return torch.baddbmm(bias[:, None], x, weight.mT)


def split(rows: Tensor, heads: int) -> Tensor:
    """(G,R,H) to (G,heads,R,H/heads)."""
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge(attended: Tensor) -> Tensor:
    """(G,heads,R,H/heads) to (G,R,H)."""
    return attended.transpose(1, 2).flatten(2)

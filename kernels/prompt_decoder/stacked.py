"""The parameters of G decoders of one kind on a leading dimension: one product does the work of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import Decoder


class Stacked:
    """Stacks parameters as they are asked for, and casts each once.

    Args:
        decoders: G decoders with the same names and shapes.
        dtype: of the products; norms stay in float32 or better.
    """

    def __init__(self, decoders: Sequence[Decoder], dtype: torch.dtype) -> None:
        self._decoders, self._dtype = decoders, dtype
        self._found: dict[tuple[str, torch.dtype | None], Tensor] = {}

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

    def attend(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Projected heads (G,heads,rows,H/heads) to (G,R,H)."""
        return self.linear(f"{name}.out_proj", merge(F.scaled_dot_product_attention(q, k, v)))

    def _get(self, name: str, dtype: torch.dtype | None) -> Tensor:
        if (name, dtype) not in self._found:
            stacked = torch.stack([decoder[name] for decoder in self._decoders])
            self._found[name, dtype] = stacked if dtype is None else stacked.to(dtype)
        return self._found[name, dtype]


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (G,R,I) · weightᵀ (G,O,I) + bias (G,O), one product a decoder."""
    return torch.baddbmm(bias[:, None], x, weight.mT)


def split(rows: Tensor, heads: int) -> Tensor:
    """(G,R,H) to (G,heads,R,H/heads)."""
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge(attended: Tensor) -> Tensor:
    """(G,heads,R,H/heads) to (G,R,H)."""
    return attended.transpose(1, 2).flatten(2)

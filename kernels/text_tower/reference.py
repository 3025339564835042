"""CLIP's causal text tower, driven with embeddings instead of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TextLayer(NamedTuple):
    """Weights of one pre-norm block; W is the width, M the width of its hidden layer."""

    ln_1_weight: Tensor
    """(W,)"""
    ln_1_bias: Tensor
    """(W,)"""
    in_proj_weight: Tensor
    """(3W,W): query, key, value"""
    in_proj_bias: Tensor
    """(3W,)"""
    out_proj_weight: Tensor
    """(W,W)"""
    out_proj_bias: Tensor
    """(W,)"""
    ln_2_weight: Tensor
    """(W,)"""
    ln_2_bias: Tensor
    """(W,)"""
    fc_weight: Tensor
    """(M,W)"""
    fc_bias: Tensor
    """(M,)"""
    proj_weight: Tensor
    """(W,M)"""
    proj_bias: Tensor
    """(W,)"""


@dataclass(frozen=True)
class TextTower:
    """A frozen text tower."""

    layers: tuple[TextLayer, ...]
    positional_embedding: Tensor
    """(context length, W)"""
    ln_final_weight: Tensor
    """(W,)"""
    ln_final_bias: Tensor
    """(W,)"""
    projection: Tensor
    """(W,D)"""
    heads: int
    eps: float = 1e-5
    """epsilon of every LayerNorm"""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"

    @property
    def context_length(self) -> int:
        return len(self.positional_embedding)

    def tensors(self) -> Iterator[Tensor]:
        """All weights."""
        for layer in self.layers:
            yield from layer
        yield from (self.positional_embedding, self.ln_final_weight, self.ln_final_bias, self.projection)

    def to(self, dtype: torch.dtype) -> TextTower:
        """The tower in another dtype; weights that have it already are shared."""
        return replace(
            self,
            layers=tuple(TextLayer(*(weight.to(dtype) for weight in layer)) for layer in self.layers),
            positional_embedding=self.positional_embedding.to(dtype),
            ln_final_weight=self.ln_final_weight.to(dtype),
            ln_final_bias=self.ln_final_bias.to(dtype),
            projection=self.projection.to(dtype),
        )


def encode(tower: TextTower, embeddings: Tensor, pooled: Tensor) -> Tensor:
    """Text features at one position of each sequence; arguments and result as `op.encode`."""
    x = embeddings + tower.positional_embedding[: embeddings.shape[1]]
    for layer in tower.layers:
        x = x + _attention(layer, layer_norm(tower, x, layer.ln_1_weight, layer.ln_1_bias), tower.heads)
        x = x + mlp(tower, layer, layer_norm(tower, x, layer.ln_2_weight, layer.ln_2_bias))
    x = x[torch.arange(len(x), device=x.device), pooled]
    return layer_norm(tower, x, tower.ln_final_weight, tower.ln_final_bias) @ tower.projection


def _attention(layer: TextLayer, x: Tensor, heads: int) -> Tensor:
    """Each token attends to itself and those before it: softmax(QKᵀ/√d + mask)V."""
    q, k, v = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2)  # (N, heads, T, d)
        for part in F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, dim=-1)
    )
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    weights = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + mask, dim=-1)
    return F.linear((weights @ v).transpose(1, 2).flatten(2), layer.out_proj_weight, layer.out_proj_bias)


def mlp(tower: TextTower, layer: TextLayer, x: Tensor) -> Tensor:
    """MLP of a block, on any (…,W)."""
    x = F.linear(x, layer.fc_weight, layer.fc_bias)
    x = x * torch.sigmoid(1.702 * x) if tower.activation == "quick_gelu" else F.gelu(x)
    return F.linear(x, layer.proj_weight, layer.proj_bias)


def layer_norm(tower: TextTower, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm with the tower's eps, on any (…,W)."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, tower.eps)

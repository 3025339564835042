"""What the frozen tower does between its matrix products: torch's operators here, kernels in fused.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import TextLayer, TextTower, layer_norm


class Continuation:
    """R sequences, each a tail that continues a prefix: who continues whom, and what of it the forms derive.

    Args:
        first, second: (R,) int64, prefix and tail of each sequence; `first` ascends.
        prefixes, tails: how many there are, N and J.
        tokens: T, tokens of a tail.
        seen: S, tokens of a prefix, padding included.
        lengths: (R,) tokens of each sequence's prefix that are not padding; None: all.
    """

    def __init__(
        self,
        first: Tensor,
        second: Tensor,
        *,
        prefixes: int,
        tails: int,
        tokens: int,
        seen: int,
        lengths: Tensor | None = None,
    ) -> None:
        self.first, self.second, self.lengths = first, second, lengths
        self.prefixes, self.tails, self.tokens, self.seen = prefixes, tails, tokens, seen

    @cached_property
    def mask(self) -> Tensor:
        """(T,S+T), or (R,1,T,S+T) with lengths: true where a tail's token sees a token of the prefix or of the tail."""
        steps = torch.arange(self.tokens, device=self.first.device)
        mask = torch.cat([steps.new_ones(self.tokens, self.seen, dtype=torch.bool), steps[:, None] >= steps], dim=1)
        if self.lengths is None:
            return mask
        count = len(self.lengths)
        there = torch.arange(self.seen, device=steps.device) < self.lengths[:, None, None]  # (R,1,S)
        own = mask[:, self.seen :].expand(count, -1, -1)
        return torch.cat([there.expand(-1, self.tokens, -1), own], dim=2)[:, None]

    @cached_property
    def starts(self) -> Tensor:
        """(N+1,) int64: sequences starts[i] to starts[i+1] continue prefix i."""
        return _starts(self.first, self.prefixes)

    @cached_property
    def by_tail(self) -> tuple[Tensor, Tensor]:
        """Sequences in the order of their tails (R,), and (J+1,) where each tail's begin in it."""
        order = self.second.argsort(stable=True)
        return order, _starts(self.second[order], self.tails)


def _starts(ascending: Tensor, count: int) -> Tensor:
    return torch.searchsorted(ascending, torch.arange(count + 1, device=ascending.device))


class Passes(NamedTuple):
    """One form of the passes of a frozen tower; every one is differentiable in its activations."""

    add_norm: Callable[[TextTower, Tensor, Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(tower, x, delta, weight, bias), x and delta (…,W) → x + delta, its LayerNorm; delta None: x itself"""
    mlp: Callable[[TextTower, TextLayer, Tensor], Tensor]
    """(tower, layer, y): MLP of a block on its normalised input (…,W)"""
    attend: Callable[[int, Tensor, Tensor, Continuation], Tensor]
    """(heads, projected (R,T,3W), prefix keys and values (N,S,2W), continuation) → (R,T,W), heads merged"""
    of_prefix: Callable[[Tensor, Continuation], Tensor]
    """rows of a table (N,…) by `first`, (R,…)"""
    of_tail: Callable[[Tensor, Continuation], Tensor]
    """rows of a table (J,…) by `second`, (R,…)"""


def add_norm(tower: TextTower, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As `Passes.add_norm`."""
    x = x if delta is None else x + delta
    return x, layer_norm(tower, x, weight, bias)


def attend(heads: int, projected: Tensor, prefix: Tensor, continuation: Continuation) -> Tensor:
    """As `Passes.attend`."""
    width = projected.shape[-1] // 3
    queries, own = projected.split([width, 2 * width], dim=-1)
    keys_values = torch.cat([prefix.index_select(0, continuation.first), own], dim=1)
    q = queries.unflatten(-1, (heads, -1)).transpose(1, 2)
    k, v = keys_values.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=continuation.mask).transpose(1, 2).flatten(2)


def of_prefix(table: Tensor, continuation: Continuation) -> Tensor:
    """As `Passes.of_prefix`."""
    return table.index_select(0, continuation.first)


def of_tail(table: Tensor, continuation: Continuation) -> Tensor:
    """As `Passes.of_tail`."""
    return table.index_select(0, continuation.second)

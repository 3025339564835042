"""The operations of a frozen block around its matrix products, as a table of functions for each implementation.

`eager.py` fills the table with torch's operators, `triton/` with kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import TextLayer, TextTower


class RaggedPairs:
    """Metadata of R sequences, each a cached prefix and a suffix; prefixes have different numbers of suffixes.

    Args:
        prefix_index, suffix_index: (R,) int64, prefix and suffix of each sequence; `prefix_index` ascends.
        prefixes, suffixes: how many there are, N and J.
        prefix_tokens: S, tokens of a prefix, padding included.
        suffix_tokens: T, tokens of a suffix.
        prefix_lengths: (R,) tokens of each sequence's prefix that are not padding, a number of the prefix; None: all.
    """

    def __init__(
        self,
        prefix_index: Tensor,
        suffix_index: Tensor,
        *,
        prefixes: int,
        suffixes: int,
        prefix_tokens: int,
        suffix_tokens: int,
        prefix_lengths: Tensor | None = None,
    ) -> None:
        self.prefix_index, self.suffix_index, self.prefix_lengths = prefix_index, suffix_index, prefix_lengths
        self.prefixes, self.suffixes = prefixes, suffixes
        self.prefix_tokens, self.suffix_tokens = prefix_tokens, suffix_tokens

    @cached_property
    def mask(self) -> Tensor:
        """(T,S+T), or (R,1,T,S+T) with prefix lengths: true where a suffix token sees a token of prefix or suffix."""
        steps = torch.arange(self.suffix_tokens, device=self.prefix_index.device)
        whole = steps.new_ones(self.suffix_tokens, self.prefix_tokens, dtype=torch.bool)
        mask = torch.cat([whole, steps[:, None] >= steps], dim=1)
        if self.prefix_lengths is None:
            return mask
        real = torch.arange(self.prefix_tokens, device=steps.device) < self.prefix_lengths[:, None, None]  # (R,1,S)
        causal = mask[:, self.prefix_tokens :].expand(len(self.prefix_lengths), -1, -1)
        return torch.cat([real.expand(-1, self.suffix_tokens, -1), causal], dim=2)[:, None]

    @cached_property
    def starts(self) -> Tensor:
        """(N+1,) int64: sequences starts[i] to starts[i+1] continue prefix i."""
        return _starts(self.prefix_index, self.prefixes)

    @cached_property
    def by_suffix(self) -> tuple[Tensor, Tensor]:
        """Sequences sorted by suffix (R,), and (J+1,) int64 where each suffix's begin in that order."""
        order = self.suffix_index.argsort(stable=True)
        return order, _starts(self.suffix_index[order], self.suffixes)


def _starts(ascending: Tensor, count: int) -> Tensor:
    return torch.searchsorted(ascending, torch.arange(count + 1, device=ascending.device))


class Stream(NamedTuple):
    """The residual stream between two blocks, or halves of one."""

    x: Tensor
    """(…,W)"""
    delta: Tensor | None = None
    """(…,W), still to be added to x, by whatever reads it; None: nothing"""
    moments: Tensor | None = None
    """(2,tiles,rows) float32 of x, as `triton/products.py` leaves them; None: not known"""

    def total(self) -> Tensor:
        """x + delta."""
        return self.x if self.delta is None else self.x + self.delta


class Products(NamedTuple):
    """The products of a block together with what stands around them; each is differentiable in its activations."""

    project: Callable[[TextTower, TextLayer, Stream], tuple[Stream, Tensor]]
    """(tower, layer, stream) → stream, queries, keys and values (…,3W) of its LayerNorm"""
    finish: Callable[[TextTower, TextLayer, Stream, Tensor], Stream]
    """(tower, layer, stream, attended (…,W)) → stream after output projection and MLP"""


class BlockOperations(NamedTuple):
    """One implementation of a frozen block's operations; each is differentiable in its activations."""

    add_norm: Callable[[TextTower, Tensor, Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(tower, x, delta, weight, bias), x and delta (…,W) → x + delta, its LayerNorm; delta None: x itself"""
    mlp: Callable[[TextTower, TextLayer, Tensor], Tensor]
    """(tower, layer, y): MLP of a block on its normalised input (…,W)"""
    attention: Callable[[int, Tensor, Tensor, RaggedPairs], Tensor]
    """(heads, queries, keys and values of suffixes (R,T,3W), keys and values of prefixes (N,S,2W), pairs) → (R,T,W)"""
    gather_prefix: Callable[[Tensor, RaggedPairs], Tensor]
    """(table (N,…), pairs) → the rows of `prefix_index`, (R,…)"""
    gather_suffix: Callable[[Tensor, RaggedPairs], Tensor]
    """(table (J,…), pairs) → the rows of `suffix_index`, (R,…)"""
    products: Callable[[TextTower, Tensor], Products | None]
    """(tower, x (…,W)) → the products to use for it; None: the library's, with `add_norm` and `mlp` between them"""

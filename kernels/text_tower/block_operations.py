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
        pooled: (R,) token of each suffix that the feature is read from; None: the last.
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
        pooled: Tensor | None = None,
    ) -> None:
        self.prefix_index, self.suffix_index, self.prefix_lengths = prefix_index, suffix_index, prefix_lengths
        self.pooled = pooled
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
    def pooled_mask(self) -> Tensor | None:
        """(R,1,1,S+T): true where the pooled token of a suffix sees a token of prefix or suffix; None: it sees all."""
        if self.pooled is None:
            return None if self.prefix_lengths is None else self.mask[..., -1:, :]
        own = torch.arange(self.suffix_tokens, device=self.pooled.device) <= self.pooled[:, None]
        prefix = torch.arange(self.prefix_tokens, device=self.pooled.device)
        lengths = self.prefix_tokens if self.prefix_lengths is None else self.prefix_lengths[:, None]
        return torch.cat([(prefix < lengths).expand(len(own), -1), own], dim=1)[:, None, None]

    def pool(self, tokens: Tensor) -> Tensor:
        """(R,W) the pooled tokens of (R,T,W), or of rows (…,W) of which the last R·T are these."""
        rows, count = tokens.flatten(0, -2), len(self.prefix_index)
        sequences = rows[len(rows) - count * self.suffix_tokens :].unflatten(0, (count, self.suffix_tokens))
        if self.pooled is None:
            return sequences[:, -1].contiguous()
        return sequences[torch.arange(count, device=tokens.device), self.pooled]

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

    kept_widths: int
    """numbers, in widths W, that backward keeps of a token in a block, the hidden layer of the MLP not counted"""

    add_norm: Callable[[TextTower, Tensor, Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(tower, x, delta, weight, bias), x and delta (…,W) → x + delta, its LayerNorm; delta None: x itself"""
    mlp: Callable[[TextTower, TextLayer, Tensor], Tensor]
    """(tower, layer, y): MLP of a block on its normalised input (…,W)"""
    attention: Callable[[int, Tensor, Tensor, RaggedPairs], Tensor]
    """(heads, queries, keys and values of suffixes (R,T,3W), keys and values of prefixes (N,S,2W), pairs) → (R,T,W)"""
    pooled_norm: Callable[[TextTower, Stream, Tensor, Tensor, RaggedPairs], tuple[Tensor, Tensor, Tensor]]
    """(tower, stream (…,W), weight, bias, pairs) → of `pairs.pool`, (R,W) of the stream and of its LayerNorm, and the
    whole LayerNorm"""
    pooled_attention: Callable[[Tensor, Tensor, Tensor, RaggedPairs, float], Tensor]
    """(queries (heads,R,W), tokens of prefixes (N,S,W) and suffixes (R,T,W), pairs, scale of scores) → (heads,R,W):
    means of the tokens that a pooled token sees, keys and values at once"""
    gather_suffix: Callable[[Tensor, RaggedPairs], Tensor]
    """(table (J,…), pairs) → the rows of `suffix_index`, (R,…)"""
    products: Callable[[TextTower, Tensor], Products | None]
    """(tower, x (…,W)) → the products to use for it; None: the library's, with `add_norm` and `mlp` between them"""

"""Metadata of pairs that go through the tower in chunks of one size, made for many chunks at once.

Sorting a chunk's pairs by suffix, and finding where each prefix and suffix begins, are a dozen small operators; what is
made for all chunks together costs a chunk nothing but views.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .block_operations import RaggedPairs

_BLOCK = 128
"""chunks whose starts are made at once: bounds the table, chunks × classes"""


class PairChunks:
    """R pairs in chunks of `size`, the last one shorter.

    Args:
        first: (R,) int64, prefix of each pair, ascending.
        suffix_index: (R,) int64, suffix of each pair.
        size: pairs of a chunk.
        prefixes, suffixes: how many there are, N and J.
        prefix_tokens, suffix_tokens: S and T, as in `RaggedPairs`.
        prefix_lengths, pooled: (R,), as in `RaggedPairs`.
    """

    def __init__(
        self,
        first: Tensor,
        suffix_index: Tensor,
        size: int,
        *,
        prefixes: int,
        suffixes: int,
        prefix_tokens: int,
        suffix_tokens: int,
        prefix_lengths: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> None:
        self.first, self.suffix_index = first, suffix_index
        self.prefix_lengths, self.pooled = prefix_lengths, pooled
        self.size, self.prefixes, self.suffixes = size, prefixes, suffixes
        self._tokens: dict[str, Any] = {"prefix_tokens": prefix_tokens, "suffix_tokens": suffix_tokens}
        self._block: tuple[int, Tensor, Tensor] | None = None

    def chunk(self, number: int, low: int, high: int) -> RaggedPairs:
        """Pairs of a chunk, whose prefixes are rows `low` to `high`, and counted from `low`.

        Args:
            number: of the chunk.
            low: prefix of its first pair, or 0.
            high: behind the prefix of its last pair.
        """
        if len(self.first) <= self.size and low == 0:  # one chunk of all rows shares nothing with others
            return RaggedPairs(
                self.first,
                self.suffix_index,
                prefixes=high,
                suffixes=self.suffixes,
                prefix_lengths=self.prefix_lengths,
                pooled=self.pooled,
                **self._tokens,
            )
        return _Chunk(self, number, low, high, self._tokens)

    @cached_property
    def from_low(self) -> Tensor:
        """(R,) prefix of each pair, counted from that of its chunk's first pair."""
        return self.first - self.first[self._numbers().mul_(self.size)]

    @property
    def order(self) -> Tensor:
        """(R,) pairs of each chunk sorted by suffix, counted from the chunk's first pair."""
        return self._sorted[1]

    def starts(self, number: int) -> tuple[Tensor, Tensor]:
        """Where each prefix's pairs begin in a chunk (N+1,), and where each suffix's do in its `order` (J+1,)."""
        block, row = divmod(number, _BLOCK)
        if self._block is None or self._block[0] != block:
            chunks = torch.arange(block * _BLOCK, (block + 1) * _BLOCK, device=self.first.device)[:, None]
            by_prefix = (self._rows - chunks * self.size).clamp(0, self.size)
            wanted = chunks * self.suffixes + torch.arange(self.suffixes + 1, device=self.first.device)
            by_suffix = torch.searchsorted(self._sorted[0], wanted) - chunks * self.size
            self._block = block, by_prefix, by_suffix
        return self._block[1][row], self._block[2][row]

    def _numbers(self) -> Tensor:
        """(R,) the chunk of each pair."""
        return torch.arange(len(self.first), device=self.first.device) // self.size

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        """Keys of the pairs, chunk · J + suffix, ascending, and `order`."""
        numbers = self._numbers()
        keys, order = torch.sort(numbers * self.suffixes + self.suffix_index, stable=True)
        return keys, order.sub_(numbers.mul_(self.size))  # sorting moves no pair to another chunk

    @cached_property
    def _rows(self) -> Tensor:
        """(N+1,) where each prefix's pairs begin among all."""
        return torch.searchsorted(self.first, torch.arange(self.prefixes + 1, device=self.first.device))


class _Chunk(RaggedPairs):
    def __init__(self, chunks: PairChunks, number: int, low: int, high: int, tokens: dict[str, int]) -> None:
        part = slice(number * chunks.size, (number + 1) * chunks.size)
        lengths, pooled = chunks.prefix_lengths, chunks.pooled
        super().__init__(
            # A chunk of all rows need not begin with a pair of the first one.
            chunks.from_low[part] if low else chunks.first[part],
            chunks.suffix_index[part],
            prefixes=high - low,
            suffixes=chunks.suffixes,
            prefix_lengths=None if lengths is None else lengths[part],
            pooled=None if pooled is None else pooled[part],
            **tokens,
        )
        self._chunks, self._at, self._part = chunks, (number, low, high), part

    @cached_property
    def starts(self) -> Tensor:
        number, low, high = self._at
        return self._chunks.starts(number)[0][low : high + 1]

    @cached_property
    def by_suffix(self) -> tuple[Tensor, Tensor]:
        return self._chunks.order[self._part], self._chunks.starts(self._at[0])[1]

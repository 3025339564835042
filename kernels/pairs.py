"""Pairs of classes: their order, and which of them a loss takes.

The P = C(C-1)/2 pairs (i,j), i < j, of C classes are numbered row-major: (0,1), (0,2), …, (1,2), …
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor


def number_of_pairs(classes: int) -> int:
    """P = C(C-1)/2."""
    return classes * (classes - 1) // 2


def pair_indices(classes: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Classes i and j of all P pairs, int64 (P,) each."""
    first, second = torch.triu_indices(classes, classes, offset=1, device=device)
    return first, second


class PairSample(NamedTuple):
    """R pairs i < j, i ascending, and the weights of their losses; on the CPU, pinned where there is a GPU."""

    first: Tensor
    """(R,) int64"""
    second: Tensor
    """(R,) int64"""
    weights: Tensor
    """(R,) float32"""


class PaddedSample(PairSample):
    """A sample of a fixed number of pairs, some of weight 0; the host reads nothing of it, so it may be recorded."""


def pad_sample(sample: PairSample, count: int, classes: int, rows: tuple[int, int] | None = None) -> PaddedSample:
    """The sample with pairs of weight 0, spread over rows, so that they are `count`: the same sums.

    Args:
        rows: first of the rows that they are spread over, and the one behind the last; None: all.

    Raises:
        ValueError: it has more pairs.
    """
    missing = count - len(sample.first)
    if missing < 0:
        raise ValueError(f"pad_sample: {len(sample.first)} pairs are more than {count}")
    low, high = rows or (0, max(classes - 1, 1))
    first = torch.cat([sample.first, low + torch.arange(missing) % (high - low)])
    second = torch.cat([sample.second, first[len(sample.first) :] + 1])
    weights = torch.cat([sample.weights, torch.zeros(missing)])
    order = first.argsort(stable=True)
    return PaddedSample(*(pin(tensor[order]) for tensor in (first, second, weights)))


def pin(tensor: Tensor) -> Tensor:
    """In page-locked memory where there is a GPU, to be copied there without waiting."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


class Chunk(NamedTuple):
    """Consecutive pairs of a selection, and the rows that their first classes lie in."""

    start: int
    """first pair, counted from the start of the selection"""
    stop: int
    low: int
    """first row, counted from the selection's first row"""
    high: int
    """behind the last row"""


@dataclass(frozen=True)
class PairSelection:
    """The pairs that a loss takes: all of C classes, or those of a sample; and of either the whole or a part."""

    classes: int
    """C"""
    sample: PairSample | None = None
    """pairs and their weights; None: all pairs, row-major"""
    bounds: tuple[int, int] | None = None
    """start and stop in the order of all pairs or of the sample, as `part` sets them; None: the whole"""
    window: Tensor | None = None
    """(K,) int64, on the device: consecutive rows that the pairs of a `PaddedSample` lie in, of which the host knows
    the number only; None: all C"""

    def __len__(self) -> int:
        """Number of pairs taken."""
        start, stop = self._bounds
        return stop - start

    def part(self, start: int, stop: int) -> PairSelection:
        """Select pairs start to stop of this selection. Losses and gradients of parts add up to those of the whole.

        Raises:
            ValueError: there are no such pairs.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"part {(start, stop)} of {len(self)} pairs")
        begin = self._bounds[0]
        return replace(self, bounds=(begin + start, begin + stop))

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Classes i and j, int64 (R,), and weights (R,) or None for ones, on a device, without waiting for it."""
        part = slice(*self._bounds)
        if self.sample is None:
            first, second = pair_indices(self.classes, device)
            return first[part], second[part], None
        first, second, weights = (tensor[part].to(device, non_blocking=True) for tensor in self.sample)
        return first, second, weights

    @property
    def rows(self) -> tuple[int, int]:
        """First row of the selection, and the one behind its last: all C where it is whole, one where it is empty."""
        if self.bounds is None:
            return 0, self.classes
        if not len(self):
            return 0, 1
        start, stop = self._bounds
        if self.sample is not None:
            return int(self.sample.first[start]), int(self.sample.first[stop - 1]) + 1
        return self._row(start), self._row(stop - 1) + 1

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Split the selection into chunks of `size` pairs, the last one shorter."""
        begin, end = self._bounds
        low = self.rows[0]
        if isinstance(self.sample, PaddedSample):  # any row, as far as the host knows
            high = self.classes if self.window is None else len(self.window)
            for start in range(begin, end, size):
                yield Chunk(start - begin, min(start + size, end) - begin, 0, high)
            return
        first = None if self.sample is None else self.sample.first[begin:end].tolist()
        for start in range(begin, end, size):
            stop = min(start + size, end)
            if first is None:
                rows = self._row(start), self._row(stop - 1)
            else:
                rows = first[start - begin], first[stop - 1 - begin]
            yield Chunk(start - begin, stop - begin, rows[0] - low, rows[1] - low + 1)

    @property
    def _bounds(self) -> tuple[int, int]:
        if self.bounds is not None:
            return self.bounds
        return 0, number_of_pairs(self.classes) if self.sample is None else len(self.sample.first)

    def _row(self, pair: int) -> int:
        """Row of a pair among all: the k last rows hold k(k+1)/2 pairs."""
        after = number_of_pairs(self.classes) - 1 - pair
        return self.classes - 2 - (isqrt(8 * after + 1) - 1) // 2


def balanced_parts(pairs: PairSelection, pieces: int, row_cost: float) -> list[tuple[int, int]]:
    """Start and stop of contiguous parts of about equal cost, which cover all pairs in order; some may be empty.

    A part costs its pairs, and `row_cost` for each row that they lie in, whose prefix it encodes: parts of the last,
    short rows have fewer pairs. No part costs more than the whole divided by `pieces`, and a row and a pair.

    Args:
        pairs: all pairs, or those of a sample on the CPU; not a part.
        row_cost: of a row, in pairs.

    Raises:
        ValueError: a part of a selection.
    """
    if pairs.bounds is not None:
        raise ValueError("balanced_parts: the pairs are a part already")
    if pairs.sample is None:
        counts = torch.arange(pairs.classes - 1, -1, -1)
    else:
        counts = torch.bincount(pairs.sample.first, minlength=pairs.classes)
    filled = counts.nonzero().flatten()
    if not len(filled):
        return [(0, 0)] * pieces
    counts = counts[filled[0] : filled[-1] + 1]
    before = counts.cumsum(0) - counts
    cost = before + row_cost * torch.arange(len(counts), dtype=torch.float64)  # where each row begins
    total = float(cost[-1] + counts[-1]) + row_cost
    targets = torch.arange(1, pieces, dtype=torch.float64) * total / pieces
    row = torch.searchsorted(cost, targets, right=True) - 1
    within = (targets - cost[row] - row_cost).clamp(min=0).round().long()
    cuts = [0, *(before[row] + torch.minimum(within, counts[row])).tolist(), len(pairs)]
    return list(pairwise(cuts))

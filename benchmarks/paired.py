"""Whether B is slower than A, beyond what A differs from itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb, inf
from statistics import median

SLOWER, FASTER, SAME = "slower", "faster", "within noise"
LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """Times of A and B in seconds, and the ratio B/A with its interval."""

    a: float
    b: float
    ratio: float
    low: float
    high: float
    noise: float | None = None
    """the ratio, at least 1, that A reaches against itself; None: it was not measured"""

    @property
    def verdict(self) -> str:
        """Slower or faster where the interval leaves 1 out and the ratio exceeds the noise."""
        noise = self.noise or 1.0
        if self.low > 1 and self.ratio > noise:
            return SLOWER
        if self.high < 1 and 1 / self.ratio > noise:
            return FASTER
        return SAME


def paired(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Compare times measured in turns: a₁, b₁, a₂, b₂, …

    The ratio is the median of bᵢ/aᵢ; the noise that of aᵢ₊₁/aᵢ, at the end of its interval that is farther from 1.
    """
    ratios = [after / before for before, after in zip(a, b, strict=True)]
    low, high = median_interval(ratios)
    least, most = median_interval([after / before for before, after in pairwise(a)])
    return Comparison(median(a), median(b), median(ratios), low, high, max(most, 1 / least))


def unpaired(a: tuple[float, float, float], b: tuple[float, float, float]) -> Comparison:
    """Compare p20, p50 and p80 of two measurements made at different times: do the ranges overlap?"""
    return Comparison(a[1], b[1], b[1] / a[1], b[0] / a[2], b[2] / a[0] if a[0] else inf)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Two of the values that enclose the median of where they come from; see `coverage`."""
    ordered, rank = sorted(values), _rank(len(values))
    return ordered[rank], ordered[-1 - rank]


def coverage(count: int) -> float:
    """Probability that the interval of so many values encloses the median: 95 % or more from 6 values on."""
    return _coverage(count, _rank(count))


def _rank(count: int) -> int:
    """How many values to leave out at either end."""
    rank = 0
    while 2 * (rank + 1) < count and _coverage(count, rank + 1) >= LEVEL:
        rank += 1
    return rank


def _coverage(count: int, rank: int) -> float:
    """One less the chance that `rank` values or fewer lie below the median, or above it."""
    return 1 - 2 * sum(comb(count, below) for below in range(rank + 1)) / 2**count

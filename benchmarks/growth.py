"""How times grow with a letter: the exponent of each curve's upper part."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .rows import Row


class Fit(NamedTuple):
    """time ~ letter^exponent over a range, ends included."""

    operator: str
    impl: str
    direction: str
    letter: str
    exponent: float
    low: int
    high: int

    @property
    def text(self) -> str:
        law = f"{self.operator} {self.impl} {self.direction}: time ~ {self.letter}^{self.exponent:.2f}"
        return f"{law} for {self.low} ≤ {self.letter} ≤ {self.high}"


def fits(rows: Iterable[Row]) -> list[Fit]:
    """Least-squares lines through the logarithms, from the middle of the range on a log scale, three points or more."""
    curves: dict[tuple[str, str, str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        letter = row.job.rpartition("/")[2]
        if row.group == "growth" and row.measured and row.p50 and letter in row.sizes:
            curves[row.operator, row.impl, row.direction, letter][row.sizes[letter]] = row.p50
    found = []
    for (operator, impl, direction, letter), curve in curves.items():
        xs = sorted(x for x in curve if x >= math.sqrt(min(curve) * max(curve)))
        if len(xs) >= 3:
            slope, _ = np.polyfit(np.log(xs), np.log([curve[x] for x in xs]), 1)
            found.append(Fit(operator, impl, direction, letter, float(slope), xs[0], xs[-1]))
    return found

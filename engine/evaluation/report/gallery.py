"""Which images a gallery shows: the surest hits, the worst misses and false alarms, and the most uncertain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..metrics import Floats, Labels

KINDS = {
    "hit": "Hits: present, and highest scored",
    "miss": "Misses: present, and lowest scored",
    "alarm": "False alarms: absent, and highest scored",
    "uncertain": "Most uncertain: nearest to the threshold",
}
"""kind → heading"""
DEEPEST = 20_000
"""entries of a kind that are looked at, the clearest first"""


@dataclass(frozen=True)
class Choice:
    """An entry to show."""

    kind: str
    row: int
    column: int


def choose_entries(labels: Labels, probabilities: Floats, thresholds: Floats, count: int) -> list[Choice]:
    """The `count` clearest entries of each kind, at most one an image and, until all have one, one a class.

    Args:
        labels: (N,C) in {1, 0, −1}.
        probabilities: (N,C).
        thresholds: (C,); a class is found above its threshold; NaN: its entries are not shown.
        count: entries of each kind.
    """
    margin = probabilities - thresholds  # classes compare by how far they are from their own threshold
    scored = np.isfinite(margin)
    present, absent, found = labels == 1, labels == 0, margin > 0
    wanted = {
        "hit": (scored & present & found, -margin),
        "miss": (scored & present & ~found, margin),
        "alarm": (scored & absent & found, -margin),
        "uncertain": (scored & (labels >= 0), np.abs(margin)),
    }
    choices = []
    for kind, (allowed, order) in wanted.items():
        rows, columns = np.nonzero(allowed)
        sequence = np.argsort(order[rows, columns], kind="stable")[:DEEPEST]
        entries = [(int(rows[i]), int(columns[i])) for i in sequence]
        kept: list[tuple[int, int]] = []
        for again in (False, True):
            for row, column in entries:
                if len(kept) == count:
                    break
                used = any(row == r or (not again and column == c) for r, c in kept)
                if not used:
                    kept.append((row, column))
        choices += [Choice(kind, row, column) for row, column in kept]
    return choices

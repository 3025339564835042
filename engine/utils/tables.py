"""CSV files that a spreadsheet can open without running anything."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .files import write_text

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # what a spreadsheet takes for a formula


def safe_cell(text: str) -> str:
    """A CSV text cell that no spreadsheet runs: an apostrophe before what would start a formula."""
    return "'" + text if text.startswith(FORMULA) else text


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file completely or not at all.

    Numbers stay as they are, NaN and None become empty cells, all other cells, and the header's, go through
    `safe_cell`.
    """

    def cell(value: object) -> object:
        if isinstance(value, int | float | np.number):
            return "" if np.isnan(value) else value
        return "" if value is None else safe_cell(str(value))

    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([cell(name) for name in header])
    writer.writerows([cell(value) for value in row] for row in rows)
    write_text(path, out.getvalue())

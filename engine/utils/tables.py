"""CSV files that a spreadsheet can open without running anything."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .files import write_text
from .text import printable

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # what a spreadsheet takes for a formula


def safe_cell(text: str) -> str:
    """A CSV text cell that no spreadsheet runs: an apostrophe before what would start a formula.

    Spaces before it do not hide it: some programs strip them.
    """
    return "'" + text if text.startswith(FORMULA) or text.lstrip().startswith(FORMULA) else text


def csv_text(text: str) -> str:
    """A text as `write_csv` writes it: one printable line that no spreadsheet runs."""
    return safe_cell(printable(text))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file completely or not at all.

    Numbers stay as they are, NaN and None become empty cells, all other cells, and the header's, go through
    `csv_text`.
    """

    def cell(value: object) -> object:
        if isinstance(value, int | float | np.number):
            return "" if np.isnan(value) else value
        return "" if value is None else csv_text(str(value))

    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([cell(name) for name in header])
    writer.writerows([cell(value) for value in row] for row in rows)
    write_text(path, out.getvalue())

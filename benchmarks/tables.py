"""Rows as text: units, a table for the terminal or in Markdown, and how times grow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .rows import OK, Row

BASELINE = "repaired"
HEAD = ("", "shape", "impl", "direction", "p50", "p20–p80", f"× {BASELINE}", "memory", "GFLOP", "roofline", "error")
Units = Sequence[tuple[float, str]]
SECONDS: Units = ((1, "s"), (1e-3, "ms"), (1e-6, "µs"))
BYTES: Units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def lines_of(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Cells of a line a row, below `HEAD`; a row without numbers has its status."""
    baselines = {(row.operator, row.shape, row.direction): row for row in rows if row.impl == BASELINE}
    lines = []
    for row in rows:
        cells = [row.operator, row.shape, row.impl, row.direction, times(row), *[""] * 6]
        if row.measured and row.p50 and row.p20 is not None and row.p80 is not None:
            scale, unit = _unit(row.p50, SECONDS)
            cells[5] = f"{number(row.p20 / scale)}–{number(row.p80 / scale)} {unit}"
            cells[6] = speed_up(row, baselines.get((row.operator, row.shape, row.direction)))
            cells[7:9] = memory(row), "" if row.flops is None else number(row.flops / 1e9)
            cells[9:] = share(row), "" if row.error is None else f"{row.error:.2g}"
        lines.append(tuple(cells))
    return lines


def times(row: Row) -> str:
    """Median time, or the reason in a word."""
    return scaled(row.p50, SECONDS) if row.measured and row.p50 else "no time" if row.status == OK else row.status


def speed_up(row: Row, baseline: Row | None) -> str:
    """Speed relative to the baseline's."""
    return f"{number(baseline.p50 / row.p50)}×" if row.p50 and baseline and baseline.p50 else ""


def memory(row: Row) -> str:
    """Peak memory with its unit."""
    return "" if row.peak_bytes is None else scaled(row.peak_bytes, BYTES)


def share(row: Row) -> str:
    """Share of the roofline."""
    return "" if row.roofline is None else f"{number(100 * row.roofline)} %"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """`HEAD` and lines for a terminal, numbers to the right."""
    table = [HEAD, *lines]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEAD))]
    sides = "<<<<" + ">" * (len(HEAD) - 4)
    return "\n".join("  ".join(f"{c:{s}{w}}" for c, s, w in zip(line, sides, widths, strict=True)) for line in table)


def reasons(rows: Iterable[Row]) -> list[str]:
    """A line for each status, or other detail, with what it befell."""
    groups: dict[str, dict[tuple[str, str], dict[str, None]]] = {}
    for row in rows:
        text = row.detail if row.measured else " ".join(filter(None, [row.status, row.detail and f"({row.detail})"]))
        if text:
            groups.setdefault(text, {}).setdefault((row.operator, row.impl), {})[row.shape] = None
    return [
        f"{text}: " + "; ".join(f"{op} {impl} ({', '.join(shapes)})" for (op, impl), shapes in found.items())
        for text, found in groups.items()
    ]


def number(value: float) -> str:
    """Three digits, none of them as an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def scaled(value: float, units: Units) -> str:
    """Three digits and a unit."""
    scale, unit = _unit(value, units)
    return f"{number(value / scale)} {unit}"


def _unit(value: float, units: Units) -> tuple[float, str]:
    return next((pair for pair in units if value >= pair[0]), units[-1])


def origin(environment: Mapping[str, Any]) -> str:
    """Device, versions and commit in a line."""
    machine, versions = environment["machine"], environment["versions"]
    names = [machine["gpu"]] if "gpu" in machine else [f"{machine['processor']}, {machine['threads']} threads"]
    names += [" ".join((name, value)) for name, value in versions.items()]
    return "; ".join([*names, f"commit {environment['commit'] or 'unknown'}"])


class Fit(NamedTuple):
    """time ~ letter^exponent over a range, ends included."""

    operator: str
    impl: str
    direction: str
    letter: str
    exponent: float
    low: int
    high: int

    def __str__(self) -> str:
        towards = "" if self.direction == "both" else f" {self.direction}"
        law = f"{self.operator} {self.impl}{towards}: time ~ {self.letter}^{self.exponent:.2f}"
        return f"{law} for {self.low} ≤ {self.letter} ≤ {self.high}"


def fits(rows: Iterable[Row]) -> list[Fit]:
    """Exponents of curves' upper parts, from the middle on a log scale, three points or more, by least squares."""
    curves: dict[tuple[str, str, str, str], dict[int, float]] = {}
    for row in rows:
        letter = row.job.rpartition("/")[2]
        if row.group == "growth" and row.measured and row.p50 and letter in row.sizes:
            curves.setdefault((row.operator, row.impl, row.direction, letter), {})[row.sizes[letter]] = row.p50
    found = []
    for key, curve in curves.items():
        xs = sorted(x for x in curve if x >= math.sqrt(min(curve) * max(curve)))
        if len(xs) >= 3:
            slope, _ = np.polyfit(np.log(xs), np.log([curve[x] for x in xs]), 1)
            found.append(Fit(*key, float(slope), xs[0], xs[-1]))
    return found

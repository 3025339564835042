"""Rows as text: units, and a table for the terminal or in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .rows import OK, Row

BASELINE = "repaired"
HEAD = ("", "shape", "impl", "direction", "p50", "p20–p80", f"× {BASELINE}", "memory", "GFLOP", "roofline", "error")
Units = Sequence[tuple[float, str]]
SECONDS: Units = ((1, "s"), (1e-3, "ms"), (1e-6, "µs"))
BYTES: Units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def lines_of(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Cells of a line a row, below `HEAD`; a row without numbers has its status."""
    baselines = {_case(row): row.p50 for row in rows if row.impl == BASELINE and row.measured}
    return [(row.operator, f"{row.shape} {row.dtype}", row.impl, row.direction, *_numbers(row, baselines)) for row in rows]


def _case(row: Row) -> tuple[str, ...]:
    return row.operator, row.shape, row.dtype, row.direction


def _numbers(row: Row, baselines: dict[tuple[str, ...], float | None]) -> list[str]:
    if not row.measured or row.p50 is None or row.p20 is None or row.p80 is None:
        return [row.status if row.status != OK else "no time", *[""] * 6]
    scale, unit = _unit(row.p50, SECONDS)
    baseline = baselines.get(_case(row))
    return [
        f"{number(row.p50 / scale)} {unit}",
        f"{number(row.p20 / scale)}–{number(row.p80 / scale)} {unit}",
        "" if baseline is None else f"{number(baseline / row.p50)}×",
        "" if row.peak_bytes is None else scaled(row.peak_bytes, BYTES),
        "" if row.flops is None else number(row.flops / 1e9),
        "" if row.roofline is None else f"{number(100 * row.roofline)} %",
        "" if row.error is None else f"{row.error:.2g}",
    ]


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table for a terminal, numbers to the right."""
    table = [head, *lines]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    words = 4
    return "\n".join(
        "  ".join(f"{c:<{w}}" if k < words else f"{c:>{w}}" for k, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in table
    )


def reasons(rows: Iterable[Row]) -> list[str]:
    """A line for each status, or other detail, with what it befell."""
    groups: dict[str, dict[tuple[str, str], dict[str, None]]] = {}
    for row in rows:
        text = row.detail if row.measured else " ".join(filter(None, [row.status, row.detail and f"({row.detail})"]))
        if text:
            groups.setdefault(text, {}).setdefault((row.operator, row.impl), {})[f"{row.shape} {row.dtype}"] = None
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

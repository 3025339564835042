"""What tables and figures share: the order of things, units, and where the numbers come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .rows import OK, Row

PROVIDERS = ("reference", "repaired", "eager", "compiled", "sampled", "triton")
BASELINE = "repaired"
DIRECTIONS = ("both", "forward", "backward")
Units = Sequence[tuple[float, str]]
SECONDS: Units = ((1, "s"), (1e-3, "ms"), (1e-6, "µs"))


class Fit(NamedTuple):
    """How fast the upper part of a growth curve rises: time ~ variable^exponent."""

    operator: str
    provider: str
    variable: str
    exponent: float
    range: tuple[float, float]
    """of the variable, ends included"""


class Case(NamedTuple):
    """What the providers of a row have in common."""

    operator: str
    C: int | None
    B: int | None
    n: int | None
    dtype: str

    @property
    def shape(self) -> str:
        """Such as C14 B16 n16 fp32."""
        sizes = [f"{name}{size}" for name, size in zip("CBn", self[1:4], strict=True) if size is not None]
        return " ".join([*sizes, self.dtype])


def case_of(row: Row) -> Case:
    """The case that a row measures."""
    return Case(row.operator, row.C, row.B, row.n, row.dtype)


def measured(row: Row) -> bool:
    """Whether a row has a time that may be shown; a difference of two times can be zero."""
    return row.status == OK and bool(row.p50)


def times(row: Row) -> tuple[float, float, float]:
    """p20, p50 and p80 of a measured row, seconds."""
    assert row.p20 is not None
    assert row.p50 is not None
    assert row.p80 is not None
    return row.p20, row.p50, row.p80


def providers_of(rows: Iterable[Row]) -> list[str]:
    """The providers of rows in their usual order, unknown ones last."""
    found = {row.provider for row in rows}
    return [name for name in PROVIDERS if name in found] + sorted(found - {*PROVIDERS, "-"})


def in_direction(rows: Sequence[Row], direction: str) -> list[Row]:
    """Rows of a direction; what is measured in one direction only, such as evaluation, counts as both."""
    found: dict[str, set[str]] = {}
    for row in rows:
        if row.provider != "-":
            found.setdefault(row.operator, set()).add(row.direction)
    whole = {operator: min(names, key=DIRECTIONS.index) for operator, names in found.items()}

    def counts_as(row: Row) -> str:
        return "both" if row.direction == whole.get(row.operator, row.direction) else row.direction

    return [row for row in rows if (row.provider == "-" and direction == "both") or counts_as(row) == direction]


def title_of(row: Row) -> str:
    """An operator, with its direction where that is not both."""
    return row.operator if row.direction == "both" else f"{row.operator}, {row.direction}"


def by_case(rows: Sequence[Row], direction: str) -> dict[Case, dict[str, Row]]:
    """Case → provider → row of one direction (see `in_direction`), in the order of the rows within an operator."""
    cases: dict[Case, dict[str, Row]] = {}
    for row in in_direction(rows, direction):
        if row.provider != "-":
            cases.setdefault(case_of(row), {})[row.provider] = row
    operators = list(dict.fromkeys(case.operator for case in cases))
    return dict(sorted(cases.items(), key=lambda item: operators.index(item[0].operator)))


def speed_up(found: Mapping[str, Row], provider: str, baseline: str = BASELINE) -> float | None:
    """How many times as fast as the baseline a provider is; None without a time of either."""
    ours, theirs = found.get(provider), found.get(baseline)
    if ours is None or theirs is None or not (measured(ours) and measured(theirs)):
        return None
    return times(theirs)[1] / times(ours)[1]


def without_numbers(rows: Iterable[Row]) -> list[str]:
    """A line for each status and reason with what it befell, for everything that has no time to show."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if not measured(row):
            status = row.status if row.status != OK else "no time"
            groups.setdefault(f"{status} ({row.detail})" if row.detail else status, []).append(row)
    return [f"{reason}: {_names(group)}" for reason, group in sorted(groups.items())]


def remarks(rows: Sequence[Row]) -> list[str]:
    """A line for each detail that belongs to times, with what it belongs to."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if measured(row) and row.detail:
            groups.setdefault(row.detail, []).append(row)
    counts = Counter(row.operator for row in rows if measured(row))
    lines = []
    for detail, group in groups.items():
        operator = group[0].operator
        every = len(group) == counts[operator] == sum(row.operator == operator for row in group)
        lines.append(f"{operator if every else _names(group)}: {detail}")
    return lines


def _names(rows: Iterable[Row]) -> str:
    """Operators, shapes and providers of rows, nothing said twice."""
    providers: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        providers.setdefault((row.operator, case_of(row).shape), {})[row.provider] = None
    shapes: dict[tuple[str, str], list[str]] = {}
    for (operator, shape), found in providers.items():
        shapes.setdefault((operator, ", ".join(name for name in found if name != "-")), []).append(shape)
    return "; ".join(f"{op} {names} ({', '.join(where)})" for (op, names), where in shapes.items())


def origin(environment: Mapping[str, Any]) -> str:
    """Device, versions and commit in a line."""
    machine, versions = environment["machine"], environment["versions"]
    names = [machine["gpu"]] if "gpu" in machine else [f"{machine['processor']}, {machine['threads']} threads"]
    names += [" ".join((name, value)) for name, value in versions.items()]
    return "; ".join([*names, f"commit {environment['commit'] or 'unknown'}"])


def peaks(environment: Mapping[str, Any]) -> str:
    """Measured FLOP/s by dtype and bandwidth in a line."""
    found = dict(environment["peaks"])
    bandwidth = found.pop("bandwidth")
    rates = [f"{name} {flops(rate)}" for name, rate in found.items()]
    return ", ".join([*rates, f"memory {number(bandwidth / 1e9)} GB/s"])


def seconds(value: float) -> str:
    """Three digits and a unit."""
    return _scaled(value, SECONDS)


def with_range(p20: float, p50: float, p80: float) -> str:
    """A median in seconds with its percentiles in the same unit: 1.21 ms (1.19–1.3)."""
    scale, unit = _unit(p50, SECONDS)
    return f"{number(p50 / scale)} {unit} ({number(p20 / scale)}–{number(p80 / scale)})"


def size(value: float) -> str:
    """Three digits and a binary unit."""
    return _scaled(value, ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")))


def flops(value: float) -> str:
    """Three digits and a unit, a second."""
    return _scaled(value, ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s")))


def number(value: float) -> str:
    """Three digits, none of them as an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _scaled(value: float, units: Units) -> str:
    scale, unit = _unit(value, units)
    return f"{number(value / scale)} {unit}"


def _unit(value: float, units: Units) -> tuple[float, str]:
    return next((pair for pair in units if value >= pair[0]), units[-1])

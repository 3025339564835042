"""`python -m benchmarks.plots RESULTS_FOLDER`: figures of measured rows, each as PNG and SVG.

Only rows with status ok are drawn; the others are listed below the figure with their reason.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pspg.engine.evaluation.report.plots import INK, STYLE
from pspg.engine.utils.errors import UserError
from pspg.engine.utils.files import check_output

from .present import (
    BASELINE,
    DIRECTIONS,
    PROVIDERS,
    Case,
    Fit,
    by_case,
    case_of,
    flops,
    in_direction,
    measured,
    number,
    origin,
    peaks,
    providers_of,
    remarks,
    seconds,
    size,
    speed_up,
    times,
    title_of,
    without_numbers,
)
from .rows import Row, read_environment, read_rows

COLOURS = dict(zip(PROVIDERS, ("#6b7280", "#d97706", "#2563a8", "#9d3c72", "#7c9a1e", "#0f8a6d"), strict=True))
OTHERS = ("#b91c1c", "#0e7490", "#a16207", "#4c1d95")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GOAL = 3.1 * 2**30
"""bytes that a phase-2 step is meant to stay below"""
WIDTH = 10.0
"""of a figure in inches"""
HEAD = 0.6
"""height of title and legend in inches"""
LINE = 0.15
"""height of a line of small print in inches"""
Drawn = Iterable[tuple[str, Callable[[], Figure]]]
"""name of a file without its ending, and the function that draws it"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what the rows allow; returns the exit status, 2 after a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("results", type=Path, help="folder that benchmarks.suite wrote")
    parser.add_argument("--output", type=Path, help="folder of the figures (RESULTS_FOLDER/plots)")
    options = parser.parse_args(arguments)
    try:
        for path in draw(options.results, options.output or options.results / "plots"):
            print(path)
    except UserError as error:
        print(f"benchmarks.plots: error: {error}", file=sys.stderr)
        return 2
    return 0


def draw(results: Path, output: Path) -> list[Path]:
    """Every figure of a results folder; returns the paths of the PNG files.

    Raises:
        UserError: no results, or the output cannot be written.
    """
    rows, environment = read_rows(results), read_environment(results)
    if not rows:
        raise UserError(f"{results}: has no rows; run python -m benchmarks.suite --output {results}")
    check_output(output)
    output.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({**STYLE, "svg.hashsalt": "benchmarks"}):
        return [_save(make(), output / name) for name, make in _figures(rows, environment)]


def fits_of(rows: Sequence[Row]) -> list[Fit]:
    """Growth exponents of the rows of suite growth."""
    growing = [row for row in rows if row.suite == "growth"]
    if not growing:
        return []
    from .growth import fits

    return fits(growing)


def _figures(rows: Sequence[Row], environment: Mapping[str, Any]) -> Drawn:
    for suite in dict.fromkeys(row.suite for row in rows):
        part = [row for row in rows if row.suite == suite]
        if suite == "growth":
            yield "growth", partial(scaling, part, fits_of(part), environment)
            continue
        for direction in DIRECTIONS:
            if in_direction(part, direction):
                yield f"{suite}-latency-{direction}", partial(latency, part, direction, environment)
        for baseline in (BASELINE, "reference"):
            if any(speed_up(found, name, baseline) for found in by_case(part, "both").values() for name in found):
                yield f"{suite}-speed-up-{baseline}", partial(speed_ups, part, baseline, environment)
        if any(row.peak_bytes for row in part):
            yield f"{suite}-memory", partial(memory, part, environment)
        if any(row.flops and row.bytes and measured(row) for row in in_direction(part, "both")):
            yield f"{suite}-roofline", partial(roofline, part, environment)


def latency(rows: Sequence[Row], direction: str, environment: Mapping[str, Any]) -> Figure:
    """Median time of each provider and shape, a panel an operator; whiskers from the 20th to the 80th percentile."""

    def point(axes: Axes, row: Row, y: float) -> None:
        p20, p50, p80 = times(row)
        axes.plot([p20, p80], [y, y], color=_colour(row.provider), lw=1.2)
        axes.plot(p50, y, "o", color=_colour(row.provider), ms=4.5)

    what = "forward and backward" if direction == "both" else direction
    return _panels(rows, direction, f"Time of a call, {what}: median, p20 to p80", point, seconds, environment)


def speed_ups(rows: Sequence[Row], baseline: str, environment: Mapping[str, Any]) -> Figure:
    """Median time of the baseline over that of each other provider, forward and backward."""
    cases = by_case(rows, "both")

    def point(axes: Axes, row: Row, y: float) -> None:
        factor = speed_up(cases[case_of(row)], row.provider, baseline)
        if factor is None or row.provider == baseline:
            return
        axes.plot([1, factor], [y, y], color=_colour(row.provider), lw=1.2)
        axes.plot(factor, y, "o", color=_colour(row.provider), ms=4.5)
        side = "left" if factor >= 1 else "right"
        shift = 5 if factor >= 1 else -5
        axes.annotate(
            number(factor), (factor, y), (shift, 0), textcoords="offset points", ha=side, va="center", fontsize=6.5
        )

    def mark(axes: Axes, operator: str) -> None:
        _dashed(axes, 1)

    def unit(value: float) -> str:
        return f"{number(value)}×"

    lost = "; ".join(
        f"{case.operator} {case.shape}" for case, found in cases.items() if speed_up(found, baseline, baseline) is None
    )
    notes = [f"no time of {baseline} to compare with: {lost}"] if lost else []
    title = f"Times as fast as {baseline}, forward and backward: ratio of medians"
    return _panels(rows, "both", title, point, unit, environment, hidden=baseline, mark=mark, notes=notes)


def memory(rows: Sequence[Row], environment: Mapping[str, Any]) -> Figure:
    """Largest memory of a call beyond what was held before it; for the phase-2 step also the goal."""

    def point(axes: Axes, row: Row, y: float) -> None:
        if row.peak_bytes:
            axes.plot(row.peak_bytes, y, "o", color=_colour(row.provider), ms=4.5)

    def mark(axes: Axes, operator: str) -> None:
        if operator == "phase2_step":
            _dashed(axes, GOAL)

    dashed = f"dashed: {size(GOAL)}, the goal of a phase-2 step with all weights; the points are without them"
    notes = [dashed] if any(row.operator == "phase2_step" for row in rows) else []
    title = "Peak memory of a call, beyond what was held before"
    return _panels(rows, "both", title, point, size, environment, mark=mark, notes=notes, base=2)


def roofline(rows: Sequence[Row], environment: Mapping[str, Any]) -> Figure:
    """Achieved FLOP/s over the FLOPs of the exact algebra per byte that must move, below the measured peaks."""
    chosen = in_direction(rows, "both")
    shown = [row for row in chosen if measured(row) and row.flops and row.bytes]
    title = "Roofline: FLOPs of the exact algebra per byte in and out, and per second, forward and backward"
    notes = [*without_numbers(chosen), f"measured peaks: {peaks(environment)}"]
    uncounted = dict.fromkeys(row.operator for row in chosen if measured(row) and not (row.flops and row.bytes))
    if uncounted:
        notes.append(f"FLOPs or bytes not counted, so not drawn: {', '.join(uncounted)}")
    figure, body = _sheet(title, 5.2, notes, environment, providers_of(shown))
    axes = body.subplots()
    markers = dict(zip(dict.fromkeys(row.operator for row in shown), cycle(MARKERS), strict=False))
    for row in shown:
        assert row.flops
        assert row.bytes
        point = row.flops / row.bytes, row.flops / times(row)[1]
        axes.plot(*point, markers[row.operator], color=_colour(row.provider), ms=6, alpha=0.9)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte")
    _draw_roof(axes, shown, environment["peaks"])
    for axis, unit, (low, high) in (
        (axes.xaxis, number, axes.get_xlim()),
        (axes.yaxis, flops, axes.get_ylim()),
    ):
        _ticks(axis, unit, high / low)
    axes.grid(True, which="major")
    handles = [Line2D([], [], color=INK, ls="", marker=marker, label=name) for name, marker in markers.items()]
    body.legend(handles=handles, loc="outside right upper")
    return figure


def scaling(rows: Sequence[Row], fits: Sequence[Fit], environment: Mapping[str, Any]) -> Figure:
    """Median time over C, B and n, one of them at a time, with the fitted exponents."""
    operators = list(dict.fromkeys(row.operator for row in rows if row.provider != "-"))
    title = "Growth of the time of a call: median, p20 to p80; in the legends the exponent fitted over a range"
    height, shown = max(len(operators), 1), [row for row in rows if measured(row)]
    notes = [*without_numbers(rows), *remarks(rows)]
    figure, body = _sheet(title, 3.6 * height, notes, environment, providers_of(shown))
    for operator, line in zip(operators, body.subplots(height, 3, squeeze=False), strict=False):
        line[0].set_title(operator)
        for variable, axes in zip("CBn", line, strict=True):
            curve = [row for row in shown if row.operator == operator and row.job.endswith(f"/{variable}")]
            _growth(axes, curve, variable, [fit for fit in fits if (fit[0], fit[2]) == (operator, variable)])
    return figure


def _growth(axes: Axes, rows: Sequence[Row], variable: str, fits: Sequence[Fit]) -> None:
    """Times of the rows over one variable."""
    varied: dict[str, Any] = {variable: None}
    others = {case_of(row)._replace(**varied).shape for row in rows}
    axes.set_xlabel(f"{variable} ({'; '.join(sorted(others))})" if others else variable)
    if not rows:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#6b7280")
        axes.set(xticks=[], yticks=[])
        return
    labels = {name: f"{variable}^{exponent:.2f} ({low:g}–{high:g})" for _, name, _, exponent, (low, high) in fits}
    for provider in providers_of(rows):
        points = sorted((getattr(row, variable), *times(row)) for row in rows if row.provider == provider)
        x, p20, p50, p80 = zip(*points, strict=True)
        label = f"{provider} {labels.get(provider, 'not fitted')}"
        axes.plot(x, p50, "o-", color=_colour(provider), ms=4, label=label)
        axes.vlines(x, p20, p80, color=_colour(provider), lw=1)
    axes.set(xscale="log", yscale="log")
    low, high = axes.get_ylim()
    high *= (high / low) ** (0.09 * len(axes.lines))  # room for the legend
    axes.set_ylim(low, high)
    _ticks(axes.yaxis, seconds, high / low)
    axes.set_xticks(sorted({getattr(row, variable) for row in rows}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.minorticks_off()
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(True, axis="y")
    axes.legend(fontsize=7.5, loc="upper left")


def _draw_roof(axes: Axes, rows: Sequence[Row], found: Mapping[str, float]) -> None:
    """A line a dtype: bandwidth times intensity up to the peak."""
    intensities = [row.flops / row.bytes for row in rows if row.flops and row.bytes]
    bandwidth = found["bandwidth"]
    places = [*intensities, *(found[row.dtype] / bandwidth for row in rows)]
    low, high = min(places) / 2, max(places) * 3
    for dtype in dict.fromkeys(row.dtype for row in rows):
        ridge = found[dtype] / bandwidth
        axes.plot([low, ridge, high], [low * bandwidth, found[dtype], found[dtype]], color=INK, lw=1, zorder=1)
        axes.annotate(
            f"{dtype} peak", (high, found[dtype]), (0, 3), textcoords="offset points", ha="right", fontsize=8, color=INK
        )


def _panels(
    rows: Sequence[Row],
    direction: str,
    title: str,
    point: Callable[[Axes, Row, float], None],
    unit: Callable[[float], str],
    environment: Mapping[str, Any],
    *,
    hidden: str = "",
    mark: Callable[[Axes, str], object] = lambda axes, operator: None,
    notes: Sequence[str] = (),
    base: int = 10,
) -> Figure:
    """A panel an operator with its cases from top to bottom, `point` for each provider of each, and `mark` once."""
    chosen = in_direction(rows, direction)
    cases = by_case(rows, direction)
    operators = list(dict.fromkeys(case.operator for case in cases))
    columns = min(2, max(len(operators), 1))
    heights = _heights(operators, cases, columns)
    names = [name for name in providers_of(row for row in chosen if measured(row)) if name != hidden]
    figure, body = _sheet(title, sum(heights), [*without_numbers(chosen), *notes], environment, names)
    grid = body.subplots(len(heights), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes in grid.flat[len(operators) :]:
        axes.set_axis_off()
    for operator, axes in zip(operators, grid.flat, strict=False):
        panel = {case: found for case, found in cases.items() if case.operator == operator}
        _panel(axes, panel, hidden, point)
        (any_row, *_), *_ = (list(found.values()) for found in panel.values())
        axes.set_title(title_of(any_row) if direction == "both" else operator)
        _log_axis(axes, unit, base)
        mark(axes, operator)
    return figure


def _heights(operators: Sequence[str], cases: Mapping[Case, Mapping[str, Row]], columns: int) -> list[float]:
    """Inches of each line of panels: those of the panel with the most rows."""
    counts = [
        sum(len(found) + 0.5 for case, found in cases.items() if case.operator == operator) for operator in operators
    ] or [1]
    return [0.75 + 0.095 * max(counts[i : i + columns]) for i in range(0, len(counts), columns)]


def _panel(
    axes: Axes, cases: Mapping[Case, Mapping[str, Row]], hidden: str, point: Callable[[Axes, Row, float], None]
) -> None:
    names = [name for name in providers_of(row for found in cases.values() for row in found.values()) if name != hidden]
    for place, found in enumerate(cases.values()):
        for index, name in enumerate(names):
            if name in found and measured(found[name]):
                point(axes, found[name], place + 0.7 * ((index + 0.5) / len(names) - 0.5))
    for place in range(1, len(cases)):
        axes.axhline(place - 0.5, color="#e5e7eb", lw=0.8, zorder=0)
    axes.set_yticks(range(len(cases)), [case.shape for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")


def _log_axis(axes: Axes, unit: Callable[[float], str], base: int) -> None:
    """A horizontal one in powers of the base, with units; at 1, 2 and 5 where decades alone would leave too few."""
    axes.set_xscale("log", base=base)
    low, high = axes.get_xlim()
    if high / low < 4:
        middle = (low * high) ** 0.5
        low, high = min(low, middle / 2.2), max(high, middle * 2.2)
    low, high = low * (low / high) ** 0.08, high * (high / low) ** 0.08
    axes.set_xlim(low, high)
    _ticks(axes.xaxis, unit, high / low, base)


def _ticks(axis: Axis, unit: Callable[[float], str], span: float, base: int = 10) -> None:
    axis.set_major_locator(LogLocator(base, subs=(1, 2, 5) if base == 10 and span < 60 else (1,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: unit(value)))
    axis.set_minor_formatter(NullFormatter())


def _sheet(
    title: str, height: float, notes: Sequence[str], environment: Mapping[str, Any], providers: Sequence[str]
) -> tuple[Figure, SubFigure]:
    """A figure with its title and legend, small print at its foot, and the part between them."""
    lines = [line for note in [*notes, origin(environment)] for line in textwrap.wrap(note, 185)]
    foot = LINE * (len(lines) + 1)
    figure = Figure(figsize=(WIDTH, HEAD + height + foot), layout="constrained")
    top, body, bottom = figure.subfigures(3, 1, height_ratios=[HEAD, height, foot])  # type: ignore[misc]
    top.text(0.01, 0.95, title, fontsize=11, fontweight="bold", va="top")
    handles = [Line2D([], [], color=_colour(name), marker="o", lw=1.2, ms=5, label=name) for name in providers]
    if handles:
        top.legend(handles=handles, loc="lower left", ncols=len(handles), bbox_to_anchor=(0, -0.1))
    bottom.text(0.01, 0.9, "\n".join(lines), fontsize=7, va="top", color="#4b5563", linespacing=1.3)
    return figure, body


def _dashed(axes: Axes, value: float) -> None:
    axes.axvline(value, color=INK, lw=1, ls="--", zorder=1)


def _colour(provider: str) -> str:
    return COLOURS.get(provider) or OTHERS[sum(provider.encode()) % len(OTHERS)]


def _save(figure: Figure, path: Path) -> Path:
    for ending, metadata in ((".svg", {"Date": None}), (".png", {"Software": None})):
        temporary = path.with_name(f".{path.name}{ending}")
        figure.savefig(temporary, format=ending[1:], dpi=130, metadata=metadata)
        figure.set_layout_engine("none")  # laid out once, by the first
        os.replace(temporary, path.with_name(path.name + ending))
    return path.with_name(path.name + ".png")


if __name__ == "__main__":
    sys.exit(main())

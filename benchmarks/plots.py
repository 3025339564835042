"""Figures of measured numbers, as PNG: times of every case, growth, scaling over ranks."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .growth import fits
from .rows import Row
from .tables import BYTES, SECONDS, number, origin, scaled

COLOURS = {
    "reference": "#6b7280",
    "repaired": "#d97706",
    "eager": "#2563a8",
    "compiled": "#9d3c72",
    "sampled": "#7c9a1e",
    "triton": "#0f8a6d",
    "torch": "#2563a8",
    "dali": "#b91c1c",
}
STYLE: Any = {  # keys of matplotlib's rcParams, which only newer versions type
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
}
GREY = "#6b7280"


def draw(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write what the parts of a results file allow; returns the paths."""
    rows, about = [row for row in content["rows"] if row.measured], origin(content["environment"])
    single = [row for row in rows if row.group != "growth"]
    pictures = {}
    if single:
        pictures["speed"] = draw_speed(single, about)
    if len(rows) > len(single):
        pictures["growth"] = draw_growth([row for row in rows if row.group == "growth"], about)
    if "scaling" in content:
        pictures["scaling"] = draw_scaling(content["scaling"])
    for name, png in pictures.items():
        (folder / f"{name}.png").write_bytes(png)
    return [folder / f"{name}.png" for name in pictures]


def draw_speed(rows: Sequence[Row], about: str) -> bytes:
    """A panel an operator: median time and p20 to p80 of each case and implementation, forward and backward."""
    wanted = [row for row in rows if row.direction == "both"]
    names = list(dict.fromkeys(row.operator for row in wanted))
    panels = {name: [row for row in wanted if row.operator == name] for name in names}
    lines = [names[i : i + 2] for i in range(0, len(names), 2)]
    heights = [0.75 + max(0.17 * len(panels[name]) for name in line) for line in lines]
    figure, grid = _sheet(
        "Time of a call, forward and backward: median, p20 to p80; beside it the peak memory", heights, 2, about
    )
    for axes, name in zip(grid, names, strict=False):
        shapes = list(dict.fromkeys(f"{row.shape} {row.dtype}" for row in panels[name]))
        impls = [impl for impl in COLOURS if any(row.impl == impl for row in panels[name])]
        for row in panels[name]:
            y = shapes.index(f"{row.shape} {row.dtype}") + 0.8 * ((impls.index(row.impl) + 0.5) / len(impls) - 0.5)
            axes.plot([row.p20, row.p80], [y, y], color=COLOURS[row.impl], lw=1.2)
            axes.plot([row.p50], [y], "o", color=COLOURS[row.impl], ms=4.5)
            if row.peak_bytes is not None:
                said = scaled(row.peak_bytes, BYTES)
                axes.annotate(said, (row.p80 or 0, y), (5, 0), textcoords="offset points", va="center", fontsize=6.5)
        axes.set_title(name)
        axes.set_yticks(range(len(shapes)), [textwrap.fill(shape, 22) for shape in shapes], fontsize=7.5)
        axes.set_ylim(len(shapes) - 0.5, -0.5)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xlim(low / 1.3, high * (high / low) ** 0.25 * 1.3)  # room for the memory
        _ticks(axes, "x")
        axes.grid(True, axis="x")
    return _png(figure, [impl for impl in COLOURS if any(row.impl == impl for row in wanted)])


def draw_growth(rows: Sequence[Row], about: str) -> bytes:
    """A panel an operator and letter: median time and p20 to p80 over the letter, exponents in the legend."""
    curves = list(dict.fromkeys((row.operator, row.job.rpartition("/")[2]) for row in rows))
    known = {(fit.operator, fit.letter, fit.impl): fit for fit in fits(rows)}
    figure, grid = _sheet("Growth of the time of a call: median, p20 to p80", [3.4] * -(-len(curves) // 3), 3, about)
    for axes, (operator, letter) in zip(grid, curves, strict=False):
        mine = [row for row in rows if (row.operator, row.job.rpartition("/")[2]) == (operator, letter)]
        for impl in [impl for impl in COLOURS if any(row.impl == impl for row in mine)]:
            points = sorted((row.sizes[letter], row.p50, row.p20, row.p80) for row in mine if row.impl == impl)
            x, p50, p20, p80 = zip(*points, strict=True)
            fit = known.get((operator, letter, impl))
            law = f" {letter}^{fit.exponent:.2f} ({fit.low}–{fit.high})" if fit else ""
            axes.plot(x, p50, "o-", color=COLOURS[impl], ms=4, label=f"{impl}{law}")
            axes.vlines(x, p20, p80, color=COLOURS[impl], lw=1)
        others = " ".join(f"{name}{size}" for name, size in mine[0].sizes.items() if name != letter)
        axes.set(xscale="log", yscale="log", xlabel=f"{letter}\n{textwrap.fill(others, 40)}", title=operator)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** (0.09 * len(axes.lines)))  # room for the legend
        _ticks(axes, "y")
        axes.set_xticks(sorted({row.sizes[letter] for row in mine}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        axes.tick_params(axis="x", labelsize=7.5)
        axes.grid(True, axis="y")
        axes.legend(fontsize=7.5, loc="upper left")
    return _png(figure, [])


def draw_scaling(found: Mapping[str, Any]) -> bytes:
    """Images per second against ranks: measured and, if there is one, modelled; what `benchmarks.scaling` found."""
    about, model = found["environment"], found.get("model")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5 * (2 if model else 1), 3.6), layout="constrained")
        panels = figure.subplots(1, 2 if model else 1, squeeze=False)[0]
    panels[0].set_title(
        f"Measured: {about['model']} model, C={about['classes']}, {about['device']}, {about['cores']} cores"
    )
    for colour, scaling in zip(("#2563a8", "#d97706"), ("strong", "weak"), strict=True):
        mine = [row for row in found["measured"] if row["scaling"] == scaling]
        unit = "over all ranks" if scaling == "strong" else "a rank"
        rates = [row["batch"] / row["seconds"] for row in mine]
        _rates(panels[0], [row["ranks"] for row in mine], rates, colour, f"{scaling}: {about['batch']} images {unit}")
        if model:
            step, ranks = model["step"], [row["ranks"] for row in model["rows"]]
            images = [step["batch"] * (1 if scaling == "strong" else count) for count in ranks]
            rates = [count / row[scaling] for count, row in zip(images, model["rows"], strict=True)]
            _rates(panels[1], ranks, rates, colour, f"{scaling}, from {step['p50']:.3g} s on one {step['device']}")
            panels[1].set_title("MODEL, not measured")
            panels[1].set_facecolor("#fdf6e3")
    for axes in panels:
        axes.legend(loc="upper left")
    return _png(figure, [])


def _rates(axes: Axes, ranks: list[int], rates: list[float], colour: str, label: str) -> None:
    """A curve, and beside it what as many ranks would do if none waited for another."""
    axes.plot(ranks, rates, "o-", color=colour, label=label, markersize=4)
    axes.plot(ranks, [rates[0] * count for count in ranks], ":", color=GREY, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="ranks (dotted: ideal)", ylabel="images / s", xticks=ranks)
    axes.set_xticklabels([str(count) for count in ranks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.grid(True)


def _sheet(title: str, heights: Sequence[float], columns: int, about: str) -> tuple[Figure, list[Axes]]:
    """A figure with panels, where its numbers come from below the title."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 1.1 + sum(heights)), layout="constrained")
        grid = figure.subplots(len(heights), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    figure.suptitle(f"{title}\n{about}", x=0.01, ha="left", fontsize=8.5)
    for axes in grid.flat:
        axes.set_axis_on()
    return figure, list(grid.flat)


def _ticks(axes: Axes, which: str) -> None:
    """Times with their units; at 1, 2 and 5 where decades alone would leave too few."""
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high / low < 60 else (1,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: scaled(value, SECONDS)))
    axis.set_minor_formatter(NullFormatter())


def _png(figure: Figure, legend: Sequence[str]) -> bytes:
    for axes in figure.axes:
        axes.set_visible(axes.has_data())
    if legend:
        handles = [Line2D([], [], color=COLOURS[name], marker="o", lw=1.2, ms=5, label=name) for name in legend]
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
    stream = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return stream.getvalue()

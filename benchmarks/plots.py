"""Pictures of measured numbers, as PNG: times of operators and steps, growth, scaling over ranks."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from .rows import Row
from .tables import BYTES, SECONDS, fits, origin, scaled

COLOURS = {
    "reference": "#6b7280",
    "repaired": "#d97706",
    "eager": "#2563a8",
    "compiled": "#9d3c72",
    "sampled": "#7c9a1e",
    "triton": "#0f8a6d",
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
    "figure.constrained_layout.use": True,
    "savefig.dpi": 130,
}


def draw(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write what the parts of a results file allow; returns the paths."""
    rows, about = [row for row in content["rows"] if row.measured], origin(content["environment"])
    growing = [row for row in rows if row.group == "growth"]
    single = [row for row in rows if row.group in ("operators", "steps") and row.direction == "both"]
    pictures = {"speed": draw_speed(single, about)} if single else {}
    if growing:
        pictures["growth"] = draw_growth(growing, about)
    if "scaling" in content:
        pictures["scaling"] = draw_scaling(content["scaling"])
    for name, png in pictures.items():
        (folder / f"{name}.png").write_bytes(png)
    return [folder / f"{name}.png" for name in pictures]


@mpl.rc_context(STYLE)
def draw_speed(rows: Sequence[Row], about: str) -> bytes:
    """A panel an operator: median time and p20 to p80 of each case and implementation, beside it the peak memory."""
    panels = {name: [row for row in rows if row.operator == name] for name in dict.fromkeys(r.operator for r in rows)}
    counts = [len(panel) for panel in panels.values()]
    heights = [0.75 + 0.17 * max(counts[i : i + 2]) for i in range(0, len(counts), 2)]
    figure = Figure(figsize=(10, 1 + sum(heights)))
    grid = figure.subplots(len(heights), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (name, panel) in zip(grid.flat, panels.items(), strict=False):
        shapes = list(dict.fromkeys(row.shape for row in panel))
        impls = _impls(panel)
        for row in panel:
            y, colour = (
                shapes.index(row.shape) + 0.8 * ((impls.index(row.impl) + 0.5) / len(impls) - 0.5),
                COLOURS[row.impl],
            )
            axes.plot([row.p20, row.p80], [y, y], color=colour, lw=1.2)
            axes.plot([row.p50], [y], "o", color=colour, ms=4.5, label=row.impl)
            memory = scaled(row.peak_bytes or 0, BYTES)
            axes.annotate(memory, (row.p80 or 0, y), (5, 0), textcoords="offset points", va="center", fontsize=6.5)
        axes.set(title=name, xscale="log", ylim=(len(shapes) - 0.5, -0.5))
        axes.set_yticks(range(len(shapes)), shapes, fontsize=7.5)
        low, high = axes.get_xlim()
        middle = (low * high) ** 0.5
        low, high = min(low, middle / 2.5), max(high, middle * 2.5)
        axes.set_xlim(low, high * (high / low) ** 0.2)  # room for the memory
        _ticks(axes, "x")
    title = f"Time of a call, forward and backward: median, p20 to p80; beside it the peak memory\n{about}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=8)
    handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels())}  # noqa: B905
    figure.legend(handles.values(), handles, loc="outside lower left", ncols=len(handles))
    return _png(figure, grid.flat[len(panels) :])


@mpl.rc_context(STYLE)
def draw_growth(rows: Sequence[Row], about: str) -> bytes:
    """A panel a sweep: median time and p20 to p80 over its letter, fitted exponents in the legend."""
    sweeps = {job: [row for row in rows if row.job == job] for job in dict.fromkeys(row.job for row in rows)}
    laws = {(fit.operator, fit.letter, fit.impl): fit for fit in fits(rows)}
    figure = Figure(figsize=(10, 0.6 + 3.4 * -(-len(sweeps) // 3)))
    grid = figure.subplots(-(-len(sweeps) // 3), 3, squeeze=False)
    for axes, (job, sweep) in zip(grid.flat, sweeps.items(), strict=False):
        _, operator, letter = job.split("/")
        for impl in _impls(sweep):
            mine = sorted((row for row in sweep if row.impl == impl), key=lambda row: row.sizes[letter])
            x, fit = [row.sizes[letter] for row in mine], laws.get((operator, letter, impl))
            label = f"{impl} {letter}^{fit.exponent:.2f} ({fit.low}–{fit.high})" if fit else impl
            axes.plot(x, [row.p50 for row in mine], "o-", color=COLOURS[impl], ms=4, label=label)
            axes.vlines(x, [row.p20 for row in mine], [row.p80 for row in mine], color=COLOURS[impl], lw=1)
        others = " ".join(f"{name}{size}" for name, size in sweep[0].sizes.items() if name != letter)
        axes.set(xscale="log", yscale="log", xlabel=f"{letter}\n{textwrap.fill(others, 40)}", title=operator)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.2)  # room for the legend
        _ticks(axes, "y")
        x = sorted({row.sizes[letter] for row in sweep})
        axes.set_xticks(x, [str(size) for size in x], fontsize=7.5)
        axes.minorticks_off()
        axes.legend(fontsize=7.5, loc="upper left")
    figure.suptitle(f"Growth of the time of a call: median, p20 to p80\n{about}", x=0.01, ha="left", fontsize=8)
    return _png(figure, grid.flat[len(sweeps) :])


@mpl.rc_context(STYLE)
def draw_scaling(found: Mapping[str, Any]) -> bytes:
    """Images per second against ranks: measured and, if there is one, modelled; what `benchmarks.scaling` found."""
    about, model = found["environment"], found.get("model")
    figure = Figure(figsize=(10 if model else 5, 3.6))
    panels = figure.subplots(1, 2 if model else 1, squeeze=False)[0]
    title = f"Measured: {about['model']} model, C={about['classes']}, {about['device']}, {about['cores']} cores"
    panels[0].set_title(title)
    for colour, scaling, unit in (("#2563a8", "strong", "over all ranks"), ("#d97706", "weak", "a rank")):
        mine = [row for row in found["measured"] if row["scaling"] == scaling]
        rates = [row["batch"] / row["seconds"] for row in mine]
        _rates(panels[0], [row["ranks"] for row in mine], rates, colour, f"{scaling}: {about['batch']} images {unit}")
        if model:
            step, ranks = model["step"], [row["ranks"] for row in model["rows"]]
            batches = [step["batch"] * (1 if scaling == "strong" else count) for count in ranks]
            rates = [batch / row[scaling] for batch, row in zip(batches, model["rows"], strict=True)]
            _rates(panels[1], ranks, rates, colour, f"{scaling}, from {step['p50']:.3g} s on one {step['device']}")
            panels[1].set(title="MODEL, not measured", facecolor="#fdf6e3")
    return _png(figure, [])


def _rates(axes: Axes, ranks: list[int], rates: list[float], colour: str, label: str) -> None:
    """A curve, and beside it what as many ranks would do if none waited for another."""
    axes.plot(ranks, rates, "o-", color=colour, label=label, markersize=4)
    axes.plot(ranks, [rates[0] * count for count in ranks], ":", color="#6b7280", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="ranks (dotted: ideal)", ylabel="images / s")
    axes.set_xticks(ranks, [str(count) for count in ranks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.grid(True)
    axes.legend(loc="upper left")


def _impls(rows: Iterable[Row]) -> list[str]:
    return sorted({row.impl for row in rows}, key=[*COLOURS].index)


def _ticks(axes: Axes, which: str) -> None:
    """Times with their units; at 1, 2 and 5 where decades alone would leave too few."""
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high / low < 60 else (1,), numticks=8))
    axis.set_major_formatter(lambda value, _: scaled(value, SECONDS))
    axis.set_minor_formatter(NullFormatter())
    axes.grid(True, axis="x" if which == "x" else "y")


def _png(figure: Figure, empty: Iterable[Axes]) -> bytes:
    for axes in empty:
        axes.set_axis_off()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()

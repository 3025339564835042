"""Pictures of measured numbers, as PNG: growth with a letter, scaling over ranks."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .rows import Row
from .tables import SECONDS, fits, origin, scaled

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
    growing, pictures = [row for row in content["rows"] if row.group == "growth" and row.measured], {}
    if growing:
        pictures["growth"] = draw_growth(growing, origin(content["environment"]))
    if "scaling" in content:
        pictures["scaling"] = draw_scaling(content["scaling"])
    for name, png in pictures.items():
        (folder / f"{name}.png").write_bytes(png)
    return [folder / f"{name}.png" for name in pictures]


@mpl.rc_context(STYLE)
def draw_growth(rows: Sequence[Row], about: str) -> bytes:
    """A panel a sweep: median time and p20 to p80 over its letter, fitted exponents in the legend."""
    sweeps = {job: [row for row in rows if row.job == job] for job in dict.fromkeys(row.job for row in rows)}
    laws = {(fit.operator, fit.letter, fit.impl): fit for fit in fits(rows)}
    figure = Figure(figsize=(10, 0.6 + 3.4 * -(-len(sweeps) // 3)))
    grid = figure.subplots(-(-len(sweeps) // 3), 3, squeeze=False)
    for axes, (job, sweep) in zip(grid.flat, sweeps.items(), strict=False):
        _, operator, letter = job.split("/")
        for impl in [impl for impl in COLOURS if any(row.impl == impl for row in sweep)]:
            mine = sorted((row for row in sweep if row.impl == impl), key=lambda row: row.sizes[letter])
            x, fit = [row.sizes[letter] for row in mine], laws.get((operator, letter, impl))
            label = f"{impl} {letter}^{fit.exponent:.2f} ({fit.low}–{fit.high})" if fit else impl
            axes.plot(x, [row.p50 for row in mine], "o-", color=COLOURS[impl], ms=4, label=label)
            axes.vlines(x, [row.p20 for row in mine], [row.p80 for row in mine], color=COLOURS[impl], lw=1)
        others = " ".join(f"{name}{size}" for name, size in sweep[0].sizes.items() if name != letter)
        axes.set(xscale="log", yscale="log", xlabel=f"{letter}\n{textwrap.fill(others, 40)}", title=operator)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.2)  # room for the legend
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high / low < 60 else (1,), numticks=8))
        axes.yaxis.set_major_formatter(lambda value, _: scaled(value, SECONDS))
        axes.grid(True, axis="y")
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


def _png(figure: Figure, empty: Iterable[Axes]) -> bytes:
    for axes in empty:
        axes.set_axis_off()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()

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
from PIL import Image

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
    """Speed-up over ranks, strong and weak: measured points and curves of the model that `benchmarks.scaling` found."""
    rows, about = found.get("model", {}).get("rows", []), found.get("environment")
    modelled = {key: part for key, part in curves(rows).items() if key[0] == rows[0]["gpu"]}
    measured = [row for row in found.get("measured", []) if "work" in row]
    figure = Figure(figsize=(10, 4.2))
    panels = dict(zip(("strong", "weak"), figure.subplots(1, 2), strict=True))
    counts = sorted({row["ranks"] for row in [*rows, *measured]})
    for scaling, axes in panels.items():
        axes.plot(counts, counts, ":", color="#6b7280", lw=1.2, label="ideal")
        shown = [(curve, part) for (_, curve, kind), part in modelled.items() if kind == scaling]
        colours = dict(
            zip(dict.fromkeys(curve.partition(", ")[2] for curve, _ in shown), list(COLOURS.values())[1:], strict=False)
        )
        for curve, part in shown:
            line = "--" if curve.startswith("sampled") else "-"
            colour = colours[curve.partition(", ")[2]]
            axes.plot([row["ranks"] for row in part], speedups(part), line, color=colour, label=f"model: {curve}")
        mine = [row for row in measured if row["scaling"] == scaling]
        if mine and about:
            label = (
                f"MEASURED: {about['device']}, {about['cores']} cores, {about['model']} model, C = {about['classes']}"
            )
            axes.plot([row["ranks"] for row in mine], speedups(mine), "o", color="black", ms=7, label=label, zorder=5)
        work = "the same step" if scaling == "strong" else "as much for each rank, more classes"
        axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="speed-up", title=f"{scaling}: {work}")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_yticks(counts, [f"{count}×" for count in counts])
        axes.minorticks_off()
        axes.grid(True)
        axes.legend(loc="upper left", fontsize=7.5)
        if rows:
            axes.set_facecolor("#fdf6e3")
    if rows:
        about_model = f"Curves are a MODEL of the {rows[0]['gpu'].upper()}, phase {rows[0]['phase']}, nothing measured"
        figure.suptitle(about_model, x=0.01, ha="left", fontsize=9)
    return _png(figure, [])


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], list[Mapping[str, Any]]]:
    """Rows of the model by GPU, curve and kind of scaling."""
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["gpu"], row["curve"], row["scaling"]), []).append(row)
    return found


def speedups(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Work in a second over that of the first row, the first of its ranks, of rows of one curve."""
    rates = [row["work"] / row["seconds"] for row in rows]
    return [rows[0]["ranks"] * rate / rates[0] for rate in rates]


def _png(figure: Figure, empty: Iterable[Axes]) -> bytes:
    for axes in empty:
        axes.set_axis_off()
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    # 64 colours look the same and take a third of the bytes.
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(packed, "png", optimize=True)
    return packed.getvalue()

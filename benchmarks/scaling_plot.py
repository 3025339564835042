"""The figure of `benchmarks.scaling`: what was measured on the left, the model on the right."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from pspg.engine.evaluation.report.plots import COLOURS, STYLE


def draw(found: dict[str, Any]) -> bytes:
    """PNG: images per second against ranks, measured and, if there is one, modelled."""
    with mpl.rc_context(STYLE):
        panels = 2 if "model" in found else 1
        figure = Figure(figsize=(5 * panels, 3.6), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        about, rows = found["environment"], found["measured"]
        axes[0].set_title(
            f"Measured: {about['model']} model, C={about['classes']}, {about['device']}, {about['cores']} cores"
        )
        for colour, scaling in zip(COLOURS, ("strong", "weak"), strict=False):
            mine = [row for row in rows if row["scaling"] == scaling]
            ranks, rates = [row["ranks"] for row in mine], [row["batch"] / row["seconds"] for row in mine]
            unit = "over all ranks" if scaling == "strong" else "a rank"
            _line(axes[0], ranks, rates, colour, f"{scaling}: {about['batch']} images {unit}")
        if panels == 2:
            step, rows = found["model"]["step"], found["model"]["rows"]
            ranks = [row["ranks"] for row in rows]
            axes[1].set_title("MODEL, not measured")
            axes[1].set_facecolor("#fdf6e3")
            for colour, scaling in zip(COLOURS, ("strong", "weak"), strict=False):
                images = [step["batch"] * (1 if scaling == "strong" else count) for count in ranks]
                rates = [count / row[scaling] for count, row in zip(images, rows, strict=True)]
                _line(axes[1], ranks, rates, colour, f"{scaling}, from {step['p50']:.3g} s on one {step['device']}")
        for panel in axes:
            panel.legend(loc="upper left")
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()


def _line(axes: Axes, ranks: list[int], rates: list[float], colour: str, label: str) -> None:
    """A curve, and beside it what as many ranks would do if none waited for another."""
    axes.plot(ranks, rates, "o-", color=colour, label=label, markersize=4)
    axes.plot(ranks, [rates[0] * count for count in ranks], ":", color="#6b7280", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="ranks (dotted: ideal)", ylabel="images / s", xticks=ranks)
    axes.set_xticklabels([str(count) for count in ranks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.grid(True)

"""Figures as SVG that stands in a page: in the page's colours, light or dark, and as wide as there is room."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

INK, SOFT, LINE, PAPER = "#1f2937", "#6b7280", "#e5e7eb", "#fefefe"
COLOURS = ("#2563a8", "#d97706", "#0f8a6d", "#9d3c72", "#6b7281")
"""of groups; told apart by colour-blind eyes"""
VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line", PAPER: "--paper"} | {
    colour: f"--g{number}" for number, colour in enumerate(COLOURS)
}
"""colour → variable of the page's style that stands for it"""
STYLE: Any = {  # keys of matplotlib's rcParams, which only newer versions type
    "font.size": 10,
    "text.parse_math": False,  # a class name may hold a dollar sign
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.useoffset": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "path.simplify_threshold": 0.2,
}


class Drawing:
    """A figure that is being drawn, and its SVG once it is."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.svg = Markup()


@contextmanager
def drawing(width: float, height: float, *, fixed: bool = False) -> Iterator[Drawing]:
    """A figure of this size (inches) in the common style, SVG on leaving; no pyplot, so no global state.

    Args:
        width, height: inches.
        fixed: keep the size; else the page's layout sets it.
    """
    with mpl.rc_context(STYLE):
        result = Drawing(Figure(figsize=(width, height), layout="constrained"))
        yield result
        out = io.StringIO()
        nothing: Any = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        result.figure.savefig(out, format="svg", metadata=nothing)
    result.svg = Markup(_inline(out.getvalue(), fixed))


def _inline(text: str, fixed: bool) -> str:
    """The element alone: matplotlib escapes its texts, but writes a document with comments."""
    text = re.sub(r"<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    if not fixed:
        text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text, count=1)
    # A hundredth of a point is less than any pixel. Texts, which may hold numbers, stay.
    text = re.sub(r' (?:d|x|y|transform)="[^"<>]*"', lambda found: re.sub(r"(?<=\.\d\d)\d+", "", found[0]), text)
    colours = "|".join(VARIABLES)
    return re.sub(
        r' style="[^"<>]*"',
        lambda found: re.sub(colours, lambda colour: f"var({VARIABLES[colour[0]]})", found[0]),
        text,
    )


def label(name: str, longest: int = 42) -> str:
    """A name that fits beside an axis; matplotlib drops legend entries that begin with an underscore."""
    line = " ".join(name.split())
    line = line if len(line) <= longest else line[: longest - 1] + "…"
    return f" {line}" if line.startswith("_") else line

"""Figures of the report as PNG bytes: curves, per-class bars, label co-occurrence, training curves."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from ..bootstrap import Intervals
from ..metrics import Floats, Labels, Metrics, check_scores

FEW = 20  # up to here every class gets its own colour and legend entry
COLOURS = (
    "#2563a8",
    "#d97706",
    "#0f8a6d",
    "#9d3c72",
    "#6b7280",
)  # of groups; told apart by colour-blind eyes
INK = "#1f2937"
STYLE: Any = {  # keys of matplotlib's rcParams, which only newer versions type
    "font.size": 9,
    "text.parse_math": False,  # a class name may hold a dollar sign
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9ca3af",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "legend.frameon": False,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.useoffset": False,
}


def curves(
    labels: ArrayLike,
    probabilities: ArrayLike,
    class_names: Sequence[str],
    *,
    group_of: Mapping[str, str] | None = None,
) -> bytes:
    """ROC and precision–recall curves of every class that has both values, and of all entries (micro).

    Few classes get a colour each, many get the colour of their group, thin.

    Args:
        labels: (N,C) in {1, 0, −1}.
        probabilities: (N,C) in [0, 1].
        class_names: C names.
        group_of: group of a class by name, such as seen or unseen.

    Raises:
        UserError: as `metrics.evaluate`.
    """
    truth, scores = check_scores(labels, probabilities, class_names)
    order, group = _group_indices(class_names, group_of or {})
    shown = sorted((c for c in range(len(class_names)) if _two_valued(truth[:, c])), key=lambda c: group[c])
    few = len(shown) <= FEW
    palette = mpl.colormaps["tab20"]
    with _figure(11.6 if few else 10.4, 4.6) as (figure, out):
        roc, pr = figure.subplots(1, 2)
        handles: list[Line2D] = []
        for position, c in enumerate(shown):
            style: dict[str, Any] = {"color": COLOURS[group[c] % len(COLOURS)], "lw": 0.7}
            style["alpha"] = 0.55 if group[c] else 0.3  # the first group, usually the largest, lies below
            if few:
                style = {"color": palette(position % 20), "lw": 1.3, "ls": (0, (4, 1.5)) if group[c] else "-"}
                suffix = f" ({order[group[c]]})" if group[c] else ""
                handles.append(Line2D([], [], label=_label(class_names[c] + suffix), **style))
            _curve(roc, pr, truth[:, c], scores[:, c], **style)
        if not few:
            handles = [
                Line2D([], [], color=COLOURS[g % len(COLOURS)], label=_label(name))
                for g, name in enumerate(order or ["classes"])
            ]
        if _two_valued(truth):
            _curve(roc, pr, truth, scores, color="black", lw=2.2)
            handles.append(Line2D([], [], color="black", lw=2.2, label="micro, all entries"))
        roc.plot([0, 1], [0, 1], color="#9ca3af", lw=0.8, ls=":")
        roc.set(title="ROC", xlabel="false positive rate", ylabel="true positive rate")
        pr.set(title="Precision–recall", xlabel="recall", ylabel="precision")
        for axes in (roc, pr):
            axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
            axes.grid()
        figure.legend(handles=handles, loc="outside right center", fontsize=8)
    return out.getvalue()


def class_bars(
    metrics: Metrics,
    intervals: Intervals | None = None,
    *,
    group_of: Mapping[str, str] | None = None,
    baseline: tuple[str, Metrics] | None = None,
) -> bytes:
    """AUC and average precision of every class that is not skipped, best first within its group.

    Args:
        metrics: of all classes.
        intervals: of the same classes, drawn as whiskers.
        group_of: group of a class by name, such as seen or unseen; colours the bars.
        baseline: name and metrics of a method to mark beside the bars.
    """
    order, indices = _group_indices([row.name for row in metrics.per_class], group_of or {})
    group = dict(zip((row.name for row in metrics.per_class), indices, strict=True))
    skipped = {skip.name for skip in metrics.skipped}
    rows = [row for row in metrics.per_class if row.name not in skipped]
    rows.sort(key=lambda row: (group[row.name], -row.auc))
    names = [row.name for row in rows]
    y = np.arange(len(rows))
    colours = [COLOURS[group[name] % len(COLOURS)] for name in names]
    other = {row.name: row for row in baseline[1].per_class} if baseline else {}
    with _figure(10.4, 1.3 + max(len(rows), 3) * 0.19) as (figure, out):
        panels = figure.subplots(1, 2, sharey=True)
        for axes, key, title in ((panels[0], "auc", "AUC"), (panels[1], "ap", "Average precision")):
            values = np.array([getattr(row, key) for row in rows])
            axes.barh(y, values, color=colours, height=0.72, alpha=0.85)
            if intervals is not None:
                found = [getattr(intervals, key)[name] for name in names]
                axes.hlines(y, [i.low for i in found], [i.high for i in found], color=INK, lw=1)
            if baseline:
                marks = [getattr(other[name], key) if name in other else np.nan for name in names]
                axes.plot(marks, y, ls="", marker="D", ms=3.5, mfc="white", mec=INK, mew=0.8)
            axes.set(title=title, xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6))
            axes.grid(axis="x")
            axes.tick_params(axis="y", length=0)
            axes.tick_params(axis="x", labeltop=len(rows) > 40)
        panels[0].axvline(0.5, color=INK, lw=0.8, ls=":")
        chance = [row.positives / (row.positives + row.negatives) for row in rows]
        panels[1].vlines(chance, y - 0.36, y + 0.36, color=INK, lw=0.8, ls=":")
        panels[0].set_yticks(y, [_label(name) for name in names], fontsize=8 if len(rows) <= 40 else 7)
        handles: list[Patch | Line2D] = [
            Patch(color=COLOURS[g % len(COLOURS)], alpha=0.85, label=_label(name)) for g, name in enumerate(order)
        ]
        if baseline:
            mark: dict[str, Any] = {"ls": "", "marker": "D", "ms": 3.5, "mfc": "white", "mec": INK}
            handles.append(Line2D([], [], label=_label(baseline[0]), **mark))
        if intervals is not None:
            handles.append(Line2D([], [], color=INK, lw=1, label=f"{intervals.level:.0%} interval"))
        handles.append(Line2D([], [], color=INK, lw=0.8, ls=":", label="chance"))
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=8)
    return out.getvalue()


def cooccurrence(labels: ArrayLike, class_names: Sequence[str]) -> bytes:
    """Share of the images with the row's class that have the column's too, with counts where classes are few.

    An image counts for a pair only where neither label is masked.

    Args:
        labels: (N,C) in {1, 0, −1}.
        class_names: C names.
    """
    truth = np.asarray(labels)
    positive, known = (truth == 1).astype(np.float64), (truth >= 0).astype(np.float64)
    both, row_known = positive.T @ positive, positive.T @ known
    shown = (row_known > 0) & ~np.eye(len(row_known), dtype=bool)
    share = np.divide(both, row_known, out=np.full_like(both, np.nan), where=shown)
    top = share[shown].max(initial=0) or 1.0
    classes = len(class_names)
    few = classes <= FEW
    side = 2.8 + classes * (0.36 if few else 0.135)
    with _figure(side + 0.6, side) as (figure, out):
        axes = figure.subplots()
        colours = mpl.colormaps["Blues"].with_extremes(bad="#f3f4f6")
        image = axes.imshow(share, cmap=colours, vmin=0, vmax=top)
        if few:
            for (i, j), count in np.ndenumerate(both):
                ink = "white" if share[i, j] > 0.55 * top else INK
                axes.text(j, i, f"{count:.0f}", ha="center", va="center", fontsize=6.5, color=ink)
        names, size = [_label(name) for name in class_names], 8 if few else 6.5
        axes.set_xticks(range(classes), names, rotation=90, fontsize=size)
        axes.set_yticks(range(classes), names, fontsize=size)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        title = "Share of the row's images that have the column's class" + ("; numbers: images" if few else "")
        axes.set_title(title, loc="left")
        bar = figure.colorbar(image, ax=axes, shrink=0.5, pad=0.02)
        bar.outline.set_visible(False)
    return out.getvalue()


def training_curves(rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """One panel for all losses and one for each other number that the rows log, against the optimizer step.

    Args:
        rows: of metrics.jsonl; each holds `step` and any numbers; null and other values are passed over.

    Returns:
        None where the rows hold no number besides step and epoch.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for key, value in row.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
            if number and key not in ("step", "epoch"):
                series.setdefault(key, []).append((row["step"], value))
    if not series:
        return None
    panels: dict[str, list[str]] = {}
    for key in sorted(series, key=_training_order):
        panels.setdefault("loss" if _is_loss(key) else key, []).append(key)
    columns = min(len(panels), 3)
    height = -(-len(panels) // columns)
    with _figure(3.6 * columns, 2.5 * height) as (figure, out):
        cells = figure.subplots(height, columns, squeeze=False).flatten()
        for axes in cells[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, keys) in zip(cells, panels.items(), strict=False):
            for key, colour in zip(keys, cycle(mpl.color_sequences["tab10"]), strict=False):
                points = np.array(series[key])
                marker = "o" if len(points) <= 40 else None
                axes.plot(points[:, 0], points[:, 1], color=colour, lw=1.4, marker=marker, ms=2.5, label=_label(key))
            axes.set_title(_label(title))
            axes.set_xlabel("step", fontsize=8)
            axes.tick_params(labelsize=7.5)
            axes.grid()
            if len(keys) > 1:
                axes.legend(fontsize=7)
    return out.getvalue()


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, io.BytesIO]]:
    """A figure of this size (inches) in the common style, saved on leaving; no pyplot, so no global state."""
    out = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, out
        figure.savefig(out, format="png", dpi=130, bbox_inches="tight", pad_inches=0.08)


def _curve(roc: Axes, pr: Axes, labels: Labels, scores: Floats, **style: Any) -> None:
    known = labels >= 0
    truth, score = labels[known], scores[known]
    false, true, _ = roc_curve(truth, score)
    precision, recall, _ = precision_recall_curve(truth, score)
    roc.plot(*_thin(false, true), **style)
    pr.plot(*_thin(recall, precision), **style)


def _thin(x: Floats, y: Floats, points: int = 800) -> tuple[Floats, Floats]:
    """Thin a curve to at most so many points, spread over its horizontal axis and its rank."""
    if x.size <= points:
        return x, y
    by_rank = np.linspace(0, x.size - 1, points // 2).astype(int)
    ascending = x if x[0] <= x[-1] else x[::-1]
    by_place = np.searchsorted(ascending, np.linspace(0, 1, points // 2)).clip(max=x.size - 1)
    if x[0] > x[-1]:
        by_place = x.size - 1 - by_place
    keep = np.union1d(by_rank, by_place)
    return x[keep], y[keep]


def _two_valued(labels: NDArray[Any]) -> bool:
    return bool((labels == 1).any() and (labels == 0).any())


def _group_indices(class_names: Sequence[str], group_of: Mapping[str, str]) -> tuple[list[str], list[int]]:
    """The groups of these classes in the mapping's order, and the place of each class's group in it."""
    used = {group_of[name] for name in class_names if name in group_of}
    order = [group for group in dict.fromkeys(group_of.values()) if group in used]
    if len(used) and any(name not in group_of for name in class_names):
        order.append("other")
    return order, [order.index(group_of.get(name, "other")) if order else 0 for name in class_names]


def _label(name: str, longest: int = 42) -> str:
    """A name that fits beside an axis; matplotlib drops legend entries that begin with an underscore."""
    line = " ".join(name.split())
    line = line if len(line) <= longest else line[: longest - 1] + "…"
    return f" {line}" if line.startswith("_") else line


def _is_loss(key: str) -> bool:
    return key.startswith("loss") or key.endswith("loss")


def _training_order(key: str) -> tuple[int, str]:
    first = [_is_loss(key), key.startswith("val_"), key == "lr", key == "images_per_s", True]
    return first.index(True), key

"""Figures of the report as SVG: curves, reliability, prevalence, label co-occurrence, training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from ..metrics import Floats, Labels, check_scores
from ..reliability import Reliability
from .svg import COLOURS, INK, SOFT, drawing, label

FEW = 20  # up to here label co-occurrence has its counts
DRAWN = 14  # up to here the curve of every class is shown from the start; of more, groups of them
GRID = np.linspace(0, 1, 101)
TAB20 = [mpl.colors.to_hex(colour) for colour in mpl.color_sequences["tab20"]]
PALETTE = TAB20[::2] + TAB20[1::2]  # pale ones last


def curves(
    labels: ArrayLike,
    probabilities: ArrayLike,
    class_names: Sequence[str],
    *,
    group_of: Mapping[str, str] | None = None,
) -> dict[str, Markup]:
    """`roc` and `pr`: a curve of every class that has both values, and of all entries (micro).

    The curve of class c has the id roc-c or pr-c, by which the page shows and hides it. Many classes have the range
    and the median of their group's curves besides.

    Args:
        labels: (N,C) in {1, 0, −1}.
        probabilities: (N,C) in [0, 1].
        class_names: C names.
        group_of: group of a class by name, such as seen or unseen.

    Raises:
        UserError: as `metrics.evaluate`.
    """
    truth, scores = check_scores(labels, probabilities, class_names)
    order, group = group_indices(class_names, group_of or {})
    shown = [c for c in range(len(class_names)) if _two_valued(truth[:, c])]
    few = len(class_names) <= DRAWN
    found = {}
    for kind, curve in (("roc", _roc), ("pr", _precision_recall)):
        with drawing(4.6, 4.4) as result:
            axes = result.figure.subplots()
            lines = {c: curve(truth[:, c], scores[:, c]) for c in shown}
            if not few:
                for g in dict.fromkeys(group[c] for c in shown):
                    _band(axes, [lines[c] for c in shown if group[c] == g], g, order[g] if order else "classes")
            for position, c in enumerate(shown):
                colour = PALETTE[position % len(PALETTE)]
                points = 400 if few else 120
                axes.plot(*thin(*lines[c], points), color=colour, lw=1.5, ls=_dash(group[c]), gid=f"{kind}-{c}")
            if _two_valued(truth):
                axes.plot(*thin(*curve(truth, scores)), color=INK, lw=2.4, label="micro, all entries")
            if kind == "roc":
                axes.plot([0, 1], [0, 1], color=SOFT, lw=0.8, ls=":", label="chance")
                axes.set(title="ROC", xlabel="false positive rate", ylabel="true positive rate")
            else:
                axes.set(title="Precision–recall", xlabel="recall", ylabel="precision")
            axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
            axes.grid()
            if axes.get_legend_handles_labels()[0]:
                result.figure.legend(loc="outside lower left", ncols=2, fontsize=8)
        found[kind] = result.svg
    return found


def reliability_diagram(rows: Mapping[str, Reliability]) -> Markup | None:
    """Share of positives against mean probability of each bin, and how many entries it has, for each name.

    Returns:
        None where nothing is labelled.
    """
    rows = {name: row for name, row in rows.items() if row.counts}
    if not rows:
        return None
    with drawing(4.6, 4.8) as result:
        top, bottom = result.figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        top.plot([0, 1], [0, 1], color=SOFT, lw=0.8, ls=":", label="calibrated")
        for number, (name, row) in enumerate(rows.items()):
            style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "lw": 1.5, "marker": "o", "ms": 3.5}
            top.plot(row.means, row.shares, label=label(name), **style)
            bottom.plot(row.means, row.counts, **style)
        top.set(title="Reliability", ylabel="share of positives", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        bottom.set(xlabel="probability", ylabel="entries", yscale="log")
        _plain_log(bottom.yaxis, fine=False)
        top.legend(fontsize=8, loc="upper left")
        for axes in (top, bottom):
            axes.grid()
    return result.svg


def prevalence(train: Sequence[float], test: Sequence[float], class_names: Sequence[str]) -> Markup | None:
    """Share of positives of each class in the training images against that in these; both axes logarithmic.

    Returns:
        None where no class is known in both.
    """
    points = [(a, b, name) for a, b, name in zip(train, test, class_names, strict=True) if a > 0 and b > 0]
    if not points:
        return None
    x, y, names = zip(*points, strict=True)
    with drawing(4.6, 4.4) as result:
        axes = result.figure.subplots()
        low, high = min(x + y) / 1.5, min(max(x + y) * 1.5, 1.2)
        axes.plot([low, high], [low, high], color=SOFT, lw=0.8, ls=":")
        axes.scatter(x, y, s=16, color=COLOURS[0], alpha=0.8, lw=0)
        places = np.log(np.array([x, y])).T / np.log(high / low)  # in widths of the figure
        named: list[int] = []
        for i in np.argsort(-np.abs(places[:, 0] - places[:, 1])):
            apart = np.abs(places[named] - places[i])  # a name takes much of the width and little of the height
            if len(named) < 5 and not ((apart[:, 0] < 0.45) & (apart[:, 1] < 0.04)).any():
                named.append(int(i))
                right = places[i, 0] > np.log(low) / np.log(high / low) + 0.6
                style: dict[str, Any] = {"ha": "right" if right else "left", "fontsize": 7.5}
                axes.annotate(
                    label(names[i], 24), (x[i], y[i]), (-4 if right else 4, 3), textcoords="offset points", **style
                )
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        axes.set(title="Share of positives", xlabel="training", ylabel="these images")
        for axis in (axes.xaxis, axes.yaxis):
            _plain_log(axis, fine=high < 100 * low)
        axes.grid()
    return result.svg


def cooccurrence(labels: ArrayLike, class_names: Sequence[str]) -> Markup:
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
    with drawing(side + 0.6, side, fixed=True) as result:
        axes = result.figure.subplots()
        colours = mpl.colormaps["Blues"].with_extremes(bad="#9ca3af33")
        image = axes.imshow(share, cmap=colours, vmin=0, vmax=top)
        if few:
            for (i, j), count in np.ndenumerate(both):
                # The cells are light or dark by themselves, whatever the page is.
                ink = "#ffffff" if share[i, j] > 0.55 * top else INK if np.isnan(share[i, j]) else "#111827"
                axes.text(j, i, f"{count:.0f}", ha="center", va="center", fontsize=6.5, color=ink)
        names, size = [label(name) for name in class_names], 8 if few else 6.5
        axes.set_xticks(range(classes), names, rotation=90, fontsize=size)
        axes.set_yticks(range(classes), names, fontsize=size)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        title = "Share of the row's images that have the column's class" + ("; numbers: images" if few else "")
        axes.set_title(title, loc="left")
        bar = result.figure.colorbar(image, ax=axes, shrink=0.5, pad=0.02)
        bar.outline.set_visible(False)
    return result.svg


def training_curves(rows: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """One panel for all losses, then one for each other number that the rows log, against the optimizer step.

    Args:
        rows: of metrics.jsonl; each holds `step` and any numbers; null and other values are passed over.

    Returns:
        None of them where the rows hold no number besides step and epoch.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for key, value in row.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
            if number and key not in ("step", "epoch"):
                series.setdefault(key, []).append((row["step"], value))
    panels: dict[str, list[str]] = {}
    for key in sorted(series, key=_training_order):
        panels.setdefault("loss" if _is_loss(key) else key, []).append(key)
    found = []
    for title, keys in panels.items():
        with drawing(3.6, 2.5) as result:
            axes = result.figure.subplots()
            for key, colour in zip(keys, cycle((*COLOURS, *PALETTE)), strict=False):
                points = np.array(series[key])
                marker = "o" if len(points) <= 40 else None
                x, y = thin(points[:, 0], points[:, 1]) if _rising(points[:, 0]) else points.T
                axes.plot(x, y, color=colour, lw=1.4, marker=marker, ms=2.5, label=label(key))
            axes.set_title(label(title))
            axes.set_xlabel("step", fontsize=8)
            axes.tick_params(labelsize=7.5)
            axes.grid()
            if len(keys) > 1:
                axes.legend(fontsize=7)
        found.append(result.svg)
    return found


def _roc(labels: Labels, scores: Floats) -> tuple[Floats, Floats]:
    known = labels >= 0
    false, true, _ = roc_curve(labels[known], scores[known])
    return false, true


def _precision_recall(labels: Labels, scores: Floats) -> tuple[Floats, Floats]:
    known = labels >= 0
    precision, recall, _ = precision_recall_curve(labels[known], scores[known])
    return recall, precision


def _band(axes: Axes, lines: Sequence[tuple[Floats, Floats]], g: int, name: str) -> None:
    """Median and 10th to 90th percentile of curves at each horizontal place."""
    heights = [np.interp(GRID, *((x, y) if x[0] <= x[-1] else (x[::-1], y[::-1]))) for x, y in lines]
    low, middle, high = np.percentile(heights, [10, 50, 90], axis=0)
    colour = COLOURS[g % len(COLOURS)]
    axes.fill_between(GRID, low, high, color=colour, alpha=0.18, lw=0)
    text = f"{label(name, 24)}: median, 10–90 % of {len(lines)}"
    axes.plot(GRID, middle, color=colour, lw=1.8, label=text)


def _plain_log(axis: Axis, *, fine: bool) -> None:
    """Ticks of a logarithmic axis as plain numbers: matplotlib's own are formulas, which are switched off."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if fine else (1.0,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _dash(group: int) -> Any:
    return (0, (4, 1.5)) if group else "-"


def thin(x: Floats, y: Floats, points: int = 400) -> tuple[Floats, Floats]:
    """Thin a curve to at most so many points, spread over its horizontal axis and its rank."""
    if x.size <= points:
        return x, y
    by_rank = np.linspace(0, x.size - 1, points // 2).astype(int)
    ascending = x if x[0] <= x[-1] else x[::-1]
    by_place = np.searchsorted(ascending, np.linspace(ascending[0], ascending[-1], points // 2)).clip(max=x.size - 1)
    if x[0] > x[-1]:
        by_place = x.size - 1 - by_place
    keep = np.union1d(by_rank, by_place)
    return x[keep], y[keep]


def _rising(x: Floats) -> bool:
    return bool((np.diff(x) >= 0).all())


def _two_valued(labels: NDArray[Any]) -> bool:
    return bool((labels == 1).any() and (labels == 0).any())


def group_indices(class_names: Sequence[str], group_of: Mapping[str, str]) -> tuple[list[str], list[int]]:
    """The groups of these classes in the mapping's order, and the place of each class's group in it."""
    used = {group_of[name] for name in class_names if name in group_of}
    order = [group for group in dict.fromkeys(group_of.values()) if group in used]
    if len(used) and any(name not in group_of for name in class_names):
        order.append("other")
    return order, [order.index(group_of.get(name, "other")) if order else 0 for name in class_names]


def _is_loss(key: str) -> bool:
    return key.startswith("loss") or key.endswith("loss")


def _training_order(key: str) -> tuple[int, str]:
    first = [_is_loss(key), key.startswith("val_"), key == "lr", key == "images_per_s", True]
    return first.index(True), key

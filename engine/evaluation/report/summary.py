"""An evaluation in the terminal: the summary, and the classes that need a look."""

from __future__ import annotations

import math

from ...utils.templates import number
from ...utils.terminal import show_table
from ..bootstrap import Interval
from .evaluation import SUMMARY, Evaluation
from .tables import low_high

CLASSES = 10
"""classes shown, those with the lowest AUC first"""


def show_summary(evaluation: Evaluation) -> None:
    """Print a row a method and group of classes, then the classes with the lowest AUC."""
    groups = list(evaluation.method.metrics)
    rows = []
    for group in groups:
        for method in evaluation.methods:
            if group not in method.metrics:
                continue
            found, intervals = method.metrics[group], method.intervals.get(group)
            label = f"{group}: {method.name}" if len(groups) > 1 else method.name
            cells = [_with_interval(getattr(found, key), getattr(intervals, key, None)) for key in SUMMARY]
            rows.append([label, *cells])
    show_table(["method", *SUMMARY.values()], rows, title=evaluation.title)
    classes = sorted((row for row in evaluation.main.per_class if not math.isnan(row.auc)), key=lambda row: row.auc)
    if len(classes) > 1:
        lowest = [[row.name, number(row.auc), number(row.ap), str(row.positives)] for row in classes]
        show_table(["class, lowest AUC first", "AUC", "AP", "positives"], lowest, most=CLASSES)
    if evaluation.main.skipped:
        left_out = [[skip.name, skip.reason] for skip in evaluation.main.skipped]
        show_table(["class in no mean", "why"], left_out, most=CLASSES)


def _with_interval(value: float, interval: Interval | None) -> str:
    bounds = low_high(interval)
    return number(value) + (f" [{number(bounds[0])}, {number(bounds[1])}]" if bounds else "")

"""An evaluation as data: metrics.json, per_class.csv and predictions.csv."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...utils.tables import write_csv
from ..bootstrap import Interval, Intervals
from ..metrics import Metrics
from .differences import class_differences, differences
from .evaluation import Evaluation
from .operating import operating

PER_CLASS = ("auc", "ap", "ap_trapezoid", "f1", "mcc")
WITH_INTERVAL = ("auc", "ap", "ap_trapezoid")


def metrics_json(evaluation: Evaluation) -> str:
    """All settings and metrics as JSON; null stands for NaN."""
    document = {
        "title": evaluation.title,
        "notes": list(evaluation.notes),
        "settings": dict(evaluation.settings),
        "trainable_parameters": {method.name: method.parameters for method in evaluation.methods},
        "results": {
            method.name: {
                group: _as_json(metrics, method.intervals.get(group)) for group, metrics in method.metrics.items()
            }
            for method in evaluation.methods
        },
        "differences": {
            other.name: {
                "groups": {
                    group: {key: asdict(one) for key, one in differences(evaluation, other, group).items()}
                    for group in evaluation.method.metrics
                },
                "classes": {
                    name: {key: asdict(one) for key, one in found.items()}
                    for name, found in class_differences(evaluation, other).items()
                },
            }
            for other in evaluation.methods[1:]
        },
        "operating": asdict(operating(evaluation)),
        "fitted": None if evaluation.fitted is None else asdict(evaluation.fitted),
    }
    return json.dumps(plain(document), indent=2, allow_nan=False) + "\n"


def write_per_class(path: Path, evaluation: Evaluation) -> None:
    """One row for each method, group and class."""
    write_csv(path, *_per_class(evaluation))


def data_tables(evaluation: Evaluation) -> dict[str, dict[str, list[Any]]]:
    """Tables of an evaluation, name → column → values, as `pandas.DataFrame` takes each.

    `summary`: a row a method and group, with every metric of `Metrics` and, where there are intervals, its bounds.
    `per_class`: a row a method, group and class. `predictions`: a row an image, its id and probabilities. `labels`:
    likewise, in {1, 0, −1}. NaN where nothing defines a metric, None for a bound that there is not.
    """
    rows = []
    for method in evaluation.methods:
        for group, metrics in method.metrics.items():
            row: dict[str, Any] = {"method": method.name, "group": group, "parameters": method.parameters}
            intervals = method.intervals.get(group)
            for key, value in (vars(metrics) | metrics.own).items():
                if isinstance(value, int | float):
                    row[key] = value
                    if isinstance(bounds := getattr(intervals, key, None), Interval):
                        row[f"{key}_low"], row[f"{key}_high"] = low_high(bounds) or (None, None)
            rows.append(row)
    columns = dict.fromkeys(key for row in rows for key in row)
    header, lines = _per_class(evaluation)
    scores, labels = np.asarray(evaluation.probabilities), np.asarray(evaluation.labels)
    names = evaluation.class_names
    return {
        "summary": {key: [row.get(key) for row in rows] for key in columns},
        "per_class": {key: [line[place] for line in lines] for place, key in enumerate(header)},
        "predictions": {"id": list(evaluation.ids), **{n: scores[:, c].tolist() for c, n in enumerate(names)}},
        "labels": {"id": list(evaluation.ids), **{n: labels[:, c].tolist() for c, n in enumerate(names)}},
    }


def _per_class(evaluation: Evaluation) -> tuple[list[str], list[list[object]]]:
    header = ["method", "group", "class", "positives", "negatives", "masked"]
    for key in PER_CLASS:
        header += [key, f"{key}_low", f"{key}_high"] if key in WITH_INTERVAL else [key]
    rows: list[list[object]] = []
    for method in evaluation.methods:
        for group, metrics in method.metrics.items():
            intervals = method.intervals.get(group)
            for row in metrics.per_class:
                cells: list[object] = [method.name, group, row.name, row.positives, row.negatives, row.masked]
                for key in PER_CLASS:
                    cells.append(getattr(row, key))
                    if key in WITH_INTERVAL:
                        cells += low_high(getattr(intervals, key)[row.name] if intervals else None) or (None, None)
                rows.append([*cells, row.threshold])
    return [*header, "threshold"], rows


def write_predictions(path: Path, evaluation: Evaluation) -> None:
    """One row for each image: its id and the probability of each class.

    All digits: scores near 1 that a shorter number would make equal rank differently when they are read back.
    """
    pairs = zip(evaluation.ids, np.asarray(evaluation.probabilities), strict=True)
    write_csv(path, ["id", *evaluation.class_names], ([name, *map(float, row)] for name, row in pairs))


def plain(value: Any) -> Any:
    """The same JSON value with null for NaN, plain numbers for numpy's, text for paths."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, os.PathLike) else value


def low_high(interval: Interval | None) -> tuple[float, float] | None:
    """Bounds of an interval; None where there is none."""
    return None if interval is None or math.isnan(interval.low) else (interval.low, interval.high)


def _as_json(metrics: Metrics, intervals: Intervals | None) -> dict[str, Any]:
    found = asdict(metrics)
    return found | found.pop("own") | {"intervals": None if intervals is None else asdict(intervals)}

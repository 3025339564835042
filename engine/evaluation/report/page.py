"""report.html, and the values that it and MODEL_CARD.md show."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ...utils.templates import html_templates, number
from ..bootstrap import Intervals
from ..metrics import ClassMetrics
from . import plots
from .differences import TOTALS, Difference, class_differences, differences
from .evaluation import CONTEXTS, SUMMARY, Evaluation
from .gallery import KINDS
from .operating import Operating
from .tables import WITH_INTERVAL, low_high, plain


def content(evaluation: Evaluation, found: Operating) -> dict[str, Any]:
    """Values of the templates of page and card.

    Args:
        evaluation: what they show.
        found: of the same evaluation.
    """
    main = evaluation.main
    any_intervals = next(iter(evaluation.method.intervals.values()), None)
    return {
        "title": evaluation.title,
        "notes": list(evaluation.notes),
        "method": evaluation.method.name,
        "about": evaluation.about,
        "baselines": [method.name for method in evaluation.methods[1:]],
        "ceilings": [method.name for method in evaluation.methods if method.ceiling],
        "summary_columns": SUMMARY,
        "groups": [_summary(group, evaluation) for group in evaluation.method.metrics],
        "difference_columns": {key: SUMMARY[key] for key in TOTALS},
        "differences": _differences(evaluation),
        "level": any_intervals.level if any_intervals else None,
        "resamples": any_intervals.resamples if any_intervals else None,
        "threshold": main.per_class[0].threshold,
        "classes": _class_rows(evaluation),
        "class_groups": list(dict.fromkeys(evaluation.group_of.values())),
        "skipped": main.skipped,
        "images": main.images,
        "masked": sum(row.masked for row in main.per_class),
        "entries": int(np.size(evaluation.labels)),
        "splits": dict(evaluation.splits),
        "operating": found,
        "fitted": evaluation.fitted,
        "settings": {key: _setting(value) for key, value in evaluation.settings.items()},
        "context_meaning": CONTEXTS[evaluation.settings["context"]],
        "training_data": evaluation.training_data,
    }


def html_page(
    shown: Mapping[str, Any],
    figures: Mapping[str, Sequence[Markup]],
    pictures: Sequence[tuple[str, str]],
    gallery: Sequence[tuple[str, str, str]] = (),
) -> str:
    """The report as one page that needs nothing beside it.

    Args:
        shown: see `content`.
        figures: see `figures`.
        pictures: captions and data URIs.
        gallery: kinds, captions and data URIs.
    """
    template = html_templates(Path(__file__).parent).get_template("report.html.j2")
    kinds = {
        title: [(caption, source) for kind, caption, source in gallery if kind == key] for key, title in KINDS.items()
    }
    return template.render({**shown, "figures": figures, "pictures": pictures, "gallery": kinds, "few": plots.DRAWN})


def _summary(group: str, evaluation: Evaluation) -> dict[str, Any]:
    """One group's rows of the summary table, one for each method that has it; a ceiling is never the best."""
    rows: list[dict[str, Any]] = []
    for method in evaluation.methods:
        if group in method.metrics:
            found, intervals = method.metrics[group], method.intervals.get(group)
            values = {key: getattr(found, key) for key in SUMMARY}
            bounds = {key: low_high(getattr(intervals, key, None)) for key in SUMMARY}
            rows.append({"method": method.name, "ceiling": method.ceiling, "values": values, "intervals": bounds})
    rivals = [row for row in rows if not row["ceiling"]]
    for key in SUMMARY:
        shown = [number(row["values"][key]) for row in rivals]
        best = max((text for text in shown if text != "–"), default=None, key=float)
        for row in rows:
            row.setdefault("best", {})[key] = (
                not row["ceiling"] and len(rivals) > 1 and number(row["values"][key]) == best
            )
    first = evaluation.method.metrics[group]
    total = len(first.per_class)
    return {"name": group, "rows": rows, "total": total, "counted": total - len(first.skipped)}


def _differences(evaluation: Evaluation) -> list[dict[str, Any]]:
    """A row for each other method and group that was resampled with the method under evaluation."""
    rows = []
    for group in evaluation.method.metrics:
        for other in evaluation.methods[1:]:
            found = differences(evaluation, other, group)
            if found:
                cells = {key: _difference(one) for key, one in found.items()}
                rows.append({"group": group, "method": other.name, "cells": cells})
    return rows


def _difference(one: Difference) -> dict[str, Any]:
    bounds = low_high(one.interval)
    text = None if bounds is None else f"{signed(bounds[0])} to {signed(bounds[1])}"
    return {"text": signed(one.value), "bounds": text, "sure": one.clear}


def signed(value: float) -> str:
    """A difference with its sign; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:+.3f}".replace("-", "−")


def _class_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Classes, the highest AUC first, those without one last."""
    intervals, group_of = evaluation.main_intervals, evaluation.group_of
    other = next((method for method in evaluation.methods[1:] if evaluation.main_group in method.metrics), None)
    beside = {row.name: row for row in other.metrics[evaluation.main_group].per_class} if other else {}
    apart = class_differences(evaluation, other) if other else {}
    rows = []
    for column, row in enumerate(evaluation.main.per_class):
        shown = _class_row(row, intervals, group_of)
        known = row.positives + row.negatives
        train = evaluation.train.get(row.name)
        shown |= {
            "column": column,
            "share": row.positives / known if known else math.nan,
            "train_share": train[0] / train[1] if train and train[1] else math.nan,
            "beside": {key: getattr(beside[row.name], key) for key in WITH_INTERVAL} if row.name in beside else {},
            "difference": _difference(apart[row.name]["auc"]) if row.name in apart else None,
            "difference_value": apart[row.name]["auc"].value if row.name in apart else math.nan,
        }
        rows.append(shown)
    return sorted(rows, key=lambda row: (math.isnan(row["auc"]), -row["auc"] if row["auc"] == row["auc"] else 0))


def _class_row(row: ClassMetrics, intervals: Intervals | None, group_of: Mapping[str, str]) -> dict[str, Any]:
    bounds = {key: low_high(getattr(intervals, key)[row.name]) if intervals else None for key in WITH_INTERVAL}
    return {**asdict(row), "group": group_of.get(row.name, ""), "intervals": bounds}


def _setting(value: Any) -> str:
    text = plain(value)
    return text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)

"""report.html, and the values that it and MODEL_CARD.md show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...utils.templates import html_templates, number
from ..bootstrap import Intervals
from ..metrics import ClassMetrics
from .evaluation import CONTEXTS, SUMMARY, Evaluation
from .tables import WITH_INTERVAL, low_high, plain


def content(evaluation: Evaluation) -> dict[str, Any]:
    """Values of the templates of page and card."""
    main, intervals = evaluation.main, evaluation.main_intervals
    any_intervals = next(iter(evaluation.method.intervals.values()), None)
    return {
        "title": evaluation.title,
        "notes": list(evaluation.notes),
        "method": evaluation.method.name,
        "about": evaluation.about,
        "baselines": [method.name for method in evaluation.methods[1:]],
        "summary_columns": SUMMARY,
        "groups": [_summary(group, evaluation) for group in evaluation.method.metrics],
        "level": any_intervals.level if any_intervals else None,
        "resamples": any_intervals.resamples if any_intervals else None,
        "threshold": main.per_class[0].threshold,
        "classes": [_class_row(row, intervals, evaluation.group_of) for row in main.per_class],
        "skipped": main.skipped,
        "images": main.images,
        "masked": sum(row.masked for row in main.per_class),
        "entries": int(np.size(evaluation.labels)),
        "settings": {key: _setting(value) for key, value in evaluation.settings.items()},
        "context_meaning": CONTEXTS[evaluation.settings["context"]],
        "training_data": evaluation.training_data,
    }


def html_page(shown: Mapping[str, Any], figures: Mapping[str, str | None], pictures: list[tuple[str, str]]) -> str:
    """The report as one page that needs nothing beside it.

    Args:
        shown: see `content`.
        figures, pictures: data URIs, see `figures`.
    """
    template = html_templates(Path(__file__).parent).get_template("report.html.j2")
    return template.render({**shown, "figures": figures, "pictures": pictures})


def _summary(group: str, evaluation: Evaluation) -> dict[str, Any]:
    """One group's rows of the summary table, one for each method that has it."""
    rows: list[dict[str, Any]] = []
    for method in evaluation.methods:
        if group in method.metrics:
            found, intervals = method.metrics[group], method.intervals.get(group)
            values = {key: getattr(found, key) for key in SUMMARY}
            bounds = {key: low_high(getattr(intervals, key, None)) for key in SUMMARY}
            rows.append({"method": method.name, "values": values, "intervals": bounds})
    for key in SUMMARY:
        shown = [number(row["values"][key]) for row in rows]
        best = max((text for text in shown if text != "–"), default=None, key=float)
        for row, text in zip(rows, shown, strict=True):
            row.setdefault("best", {})[key] = len(rows) > 1 and text == best
    first = evaluation.method.metrics[group]
    total = len(first.per_class)
    return {"name": group, "rows": rows, "total": total, "counted": total - len(first.skipped)}


def _class_row(row: ClassMetrics, intervals: Intervals | None, group_of: Mapping[str, str]) -> dict[str, Any]:
    bounds = {key: low_high(getattr(intervals, key)[row.name]) if intervals else None for key in WITH_INTERVAL}
    return {**asdict(row), "group": group_of.get(row.name, ""), "intervals": bounds}


def _setting(value: Any) -> str:
    text = plain(value)
    return text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)

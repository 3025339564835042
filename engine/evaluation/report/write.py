"""Results as files: metrics.json, per_class.csv, predictions.csv, report.html and MODEL_CARD.md."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from ...utils.errors import UserError
from ...utils.files import write_text
from ...utils.templates import html_templates, markdown_templates, number
from ..bootstrap import Interval, Intervals
from ..metrics import ClassMetrics, Metrics, check_scores
from . import plots

HERE = Path(__file__).parent
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # what a spreadsheet takes for a formula
SUMMARY = {
    "macro_auc": "Macro AUC",
    "micro_auc": "Micro AUC",
    "map_ap": "mAP",
    "map_trapezoid": "mAP (trapezoid)",
    "macro_f1": "F1",
    "macro_mcc": "MCC",
}
PER_CLASS = ("auc", "ap", "ap_trapezoid", "f1", "mcc")
WITH_INTERVAL = ("auc", "ap", "ap_trapezoid")
CONTEXTS = {
    "batch": "scores depend on which images share a batch; the batch size is part of the result",
    "bank": "scores do not depend on batches: the prompts attend to a fixed bank of training images",
    "none": "scores depend on the image and the class alone",
    "unknown": "what scores depend on besides the image and the class is not known here",
}


def write_report(
    folder: Path,
    *,
    title: str,
    metrics: Mapping[str, Metrics],
    class_names: Sequence[str],
    ids: Sequence[str],
    labels: ArrayLike,
    probabilities: ArrayLike,
    settings: Mapping[str, Any],
    intervals: Mapping[str, Intervals] | None = None,
    baselines: Mapping[str, Mapping[str, Metrics]] | None = None,
    baseline_intervals: Mapping[str, Mapping[str, Intervals]] | None = None,
    method: str = "PsPG",
    about: str | None = None,
    parameters: Mapping[str, int | None] | None = None,
    pictures: Sequence[tuple[str, Path | bytes]] = (),
    training: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    training_data: str | None = None,
    progress: bool = True,
) -> Path:
    """Write every result of one evaluation; each file is complete or absent.

    The first group is the main one: curves, bars and the per-class table show its classes, coloured by the
    last other group that holds them. Only what is passed in is written: ids as given, pictures only if passed.

    Args:
        folder: made if missing; files of an earlier report are replaced.
        title: heading of the report and the model card.
        metrics: by group of classes, such as all, seen, unseen.
        class_names: C names, those of the first group.
        ids: N image ids, for predictions.csv.
        labels: (N,C) in {1, 0, −1}.
        probabilities: (N,C) in [0, 1].
        settings: what was run; must hold `context` (a key of CONTEXTS) and `batch_size`. JSON values.
        intervals: by group.
        baselines: metrics by method name, then by group.
        baseline_intervals: likewise.
        method: name of the evaluated method beside the baselines.
        about: what it is, for the model card, to go after its name; None: PsPG, which the card describes.
        parameters: by method name, how many its training adapts (a CLIP under templates: all of its own); None: not
            known.
        pictures: captions with a PNG or JPEG, as path or bytes.
        training: rows of metrics.jsonl.
        notes: statements shown at the top, such as that phantoms are no clinical data.
        training_data: what the model was trained on, for the model card.
        progress: show a progress bar if drawing takes more than a second.

    Returns:
        Path of report.html.

    Raises:
        UserError: bad scores (as `metrics.evaluate`); a picture is missing or neither PNG nor JPEG.
        ValueError: arguments that do not belong together.
    """
    truth, scores = check_scores(labels, probabilities, class_names)
    main = _check(metrics, class_names, ids, len(truth), settings)
    intervals, baselines = intervals or {}, baselines or {}
    images = [(caption, _data_uri(picture)) for caption, picture in pictures]
    methods = [(method, metrics, intervals)]
    methods += [(name, found, (baseline_intervals or {}).get(name, {})) for name, found in baselines.items()]

    group_of = {row.name: group for group, found in list(metrics.items())[1:] for row in found.per_class}
    first = next(((name, found[main]) for name, found in baselines.items() if main in found), None)
    drawings = {
        "curves": lambda: plots.curves(truth, scores, class_names, group_of=group_of),
        "bars": lambda: plots.class_bars(metrics[main], intervals.get(main), group_of=group_of, baseline=first),
        "cooccurrence": lambda: plots.cooccurrence(truth, class_names),
        "training": lambda: plots.training_curves(training),
    }
    bar = tqdm(drawings.items(), desc="figures", unit="figure", leave=False, delay=1, disable=not progress)
    figures = {name: None if (png := draw()) is None else _data_uri(png) for name, draw in bar}

    content = {
        "title": title,
        "notes": list(notes),
        "method": method,
        "about": about,
        "baselines": list(baselines),
        "summary_columns": SUMMARY,
        "groups": [_summary(group, methods) for group in metrics],
        "level": next((found.level for found in intervals.values()), None),
        "resamples": next((found.resamples for found in intervals.values()), None),
        "threshold": metrics[main].per_class[0].threshold,
        "classes": [_class_row(row, intervals.get(main), group_of) for row in metrics[main].per_class],
        "skipped": metrics[main].skipped,
        "images": metrics[main].images,
        "masked": sum(row.masked for row in metrics[main].per_class),
        "entries": int(truth.size),
        "figures": figures,
        "pictures": images,
        "settings": {key: _setting(value) for key, value in settings.items()},
        "context_meaning": CONTEXTS[settings["context"]],
        "training_data": training_data,
    }
    document = {
        "title": title,
        "notes": list(notes),
        "settings": dict(settings),
        "trainable_parameters": {name: (parameters or {}).get(name) for name, *_ in methods},
        "results": {
            name: {group: _as_json(m, found_intervals.get(group)) for group, m in found.items()}
            for name, found, found_intervals in methods
        },
    }
    results = json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    card = markdown_templates(HERE).get_template("model_card.md.j2").render(content)
    page = html_templates(HERE).get_template("report.html.j2").render(content)

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "metrics.json", results)
    _write_per_class(folder / "per_class.csv", methods)
    # All digits: scores near 1 that a shorter number would make equal rank differently when they are read back.
    rows = ([name, *map(float, row)] for name, row in zip(ids, scores, strict=True))
    write_csv(folder / "predictions.csv", ["id", *class_names], rows)
    write_text(folder / "MODEL_CARD.md", card)
    write_text(folder / "report.html", page)
    return folder / "report.html"


def safe_cell(text: str) -> str:
    """A CSV text cell that no spreadsheet runs: an apostrophe before what would start a formula."""
    return "'" + text if text.startswith(FORMULA) else text


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file whole or not at all.

    Numbers stay as they are, NaN and None become empty cells, all other cells, and the header's, go through
    `safe_cell`.
    """

    def cell(value: object) -> object:
        if isinstance(value, int | float | np.number):
            return "" if np.isnan(value) else value
        return "" if value is None else safe_cell(str(value))

    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([cell(name) for name in header])
    writer.writerows([cell(value) for value in row] for row in rows)
    write_text(path, out.getvalue())


def _check(
    metrics: Mapping[str, Metrics],
    class_names: Sequence[str],
    ids: Sequence[str],
    rows: int,
    settings: Mapping[str, Any],
) -> str:
    """Name of the main group."""
    if settings.get("context") not in CONTEXTS or "batch_size" not in settings:
        raise ValueError(f"settings must hold context ({', '.join(CONTEXTS)}) and batch_size")
    if not metrics:
        raise ValueError("metrics must hold at least one group")
    main = next(iter(metrics))
    if [row.name for row in metrics[main].per_class] != list(class_names):
        raise ValueError(f"class_names are not the classes of the first group '{main}'")
    if len(ids) != rows:
        raise ValueError(f"{len(ids)} ids for {rows} rows")
    return main


def _summary(
    group: str, methods: Sequence[tuple[str, Mapping[str, Metrics], Mapping[str, Intervals]]]
) -> dict[str, Any]:
    """One group's rows of the summary table, one for each method that has it."""
    rows: list[dict[str, Any]] = []
    for name, metrics, intervals in methods:
        if group in metrics:
            found, spread = metrics[group], intervals.get(group)
            values = {key: getattr(found, key) for key in SUMMARY}
            spreads = {key: _pair(getattr(spread, key, None)) for key in SUMMARY}
            rows.append({"method": name, "values": values, "intervals": spreads})
    for key in SUMMARY:
        shown = [number(row["values"][key]) for row in rows]
        best = max((text for text in shown if text != "–"), default=None, key=float)
        for row, text in zip(rows, shown, strict=True):
            row.setdefault("best", {})[key] = len(rows) > 1 and text == best
    first = next(metrics[group] for _, metrics, _ in methods if group in metrics)
    total = len(first.per_class)
    return {"name": group, "rows": rows, "total": total, "counted": total - len(first.skipped)}


def _class_row(row: ClassMetrics, intervals: Intervals | None, group_of: Mapping[str, str]) -> dict[str, Any]:
    spreads = {key: _pair(getattr(intervals, key)[row.name]) if intervals else None for key in WITH_INTERVAL}
    return {**asdict(row), "group": group_of.get(row.name, ""), "intervals": spreads}


def _write_per_class(path: Path, methods: Sequence[tuple[str, Mapping[str, Metrics], Mapping[str, Intervals]]]) -> None:
    header = ["method", "group", "class", "positives", "negatives", "masked"]
    for key in PER_CLASS:
        header += [key, f"{key}_low", f"{key}_high"] if key in WITH_INTERVAL else [key]
    rows: list[list[object]] = []
    for method, metrics, intervals in methods:
        for group, found in metrics.items():
            for row in found.per_class:
                cells: list[object] = [method, group, row.name, row.positives, row.negatives, row.masked]
                for key in PER_CLASS:
                    cells.append(getattr(row, key))
                    if key in WITH_INTERVAL:
                        spread = getattr(intervals[group], key)[row.name] if group in intervals else None
                        cells += _pair(spread) or (None, None)
                rows.append([*cells, row.threshold])
    write_csv(path, [*header, "threshold"], rows)


def _as_json(metrics: Metrics, intervals: Intervals | None) -> dict[str, Any]:
    return asdict(metrics) | {"intervals": None if intervals is None else asdict(intervals)}


def _finite(value: Any) -> Any:
    """The same JSON value with null for NaN, plain numbers for numpy's, text for paths."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        return _finite(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, os.PathLike) else value


def _setting(value: Any) -> str:
    plain = _finite(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _pair(spread: Interval | None) -> tuple[float, float] | None:
    return None if spread is None or math.isnan(spread.low) else (spread.low, spread.high)


def _data_uri(picture: Path | bytes) -> str:
    if isinstance(picture, bytes):
        content, name = picture, "a picture of the report"
    else:
        try:
            content, name = picture.read_bytes(), str(picture)
        except OSError as error:
            raise UserError(f"{picture}: cannot be read for the report ({error.strerror})") from error
    for kind, magic in (("png", b"\x89PNG\r\n\x1a\n"), ("jpeg", b"\xff\xd8\xff")):
        if content.startswith(magic):
            return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
    raise UserError(f"{name}: neither PNG nor JPEG; convert it")

"""A study's table as CSV, Markdown and HTML."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from scipy.stats import t as student

from ...evaluation.report.evaluation import SUMMARY
from ...utils.files import write_text
from ...utils.tables import write_csv
from ...utils.templates import html_templates, markdown_templates
from .config import Column, RowSpec, StudyConfig

QUOTED = "as quoted"
COLUMNS: dict[Column, str] = {"parameters": "#P", "memory": "Peak memory", "step_time": "Time a step"}


@dataclass(frozen=True)
class Result:
    """Outcome of a cell."""

    status: Literal["ok", "failed", "not run"]
    values: Mapping[str, float | None] = field(default_factory=dict)
    """metric → in [0, 1]; None: no class had both label values"""
    intervals: Mapping[str, Mapping[str, float] | None] = field(default_factory=dict)
    """metric → low and high of the bootstrap"""
    parameters: int | None = None
    """trainable parameters"""
    peak_bytes: int | None = None
    """peak memory of the training"""
    step_seconds: float | None = None
    """seconds an optimizer step of the training"""


@dataclass(frozen=True)
class Number:
    """A number of the table, in percent."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    section: str
    name: str
    quoted: bool
    status: str
    """ok, or why a number is missing"""
    facts: Mapping[Column, float | None]
    """parameters; bytes; seconds"""
    numbers: Mapping[tuple[str, str], Number | None]
    """(data set, metric) → number"""
    home: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Table:
    """A study and what is known of its cells."""

    study: StudyConfig
    results: Mapping[tuple[int, str, int], Result]
    """(row, data set, seed) → result"""

    def lines(self) -> Iterator[Line]:
        """Rows in order, each followed by its quoted numbers."""
        for number, row in enumerate(self.study.rows):
            if row.measured:
                yield self._line(number, row)
            if self.study.quoted and row.quoted:
                quoted: dict[tuple[str, str], Number | None] = {
                    (name, metric): Number(value)
                    for name, values in row.quoted.items()
                    for metric, value in zip(self.study.metrics, values, strict=True)
                }
                yield Line(row.section, row.name, True, "ok", {}, quoted, frozenset(row.home))

    def _line(self, number: int, row: RowSpec) -> Line:
        of_sets = {
            name: [self.results[number, name, seed] for seed in self.study.seeds] for name in self.study.data_sets
        }
        every = [result for results in of_sets.values() for result in results]
        status = next((result.status for result in every if result.status != "ok"), "ok")
        numbers: dict[tuple[str, str], Number | None] = {
            (name, metric): _number(results, metric)
            for name, results in of_sets.items()
            for metric in self.study.metrics
        }
        facts: dict[Column, float | None] = {
            "parameters": _most(result.parameters for result in every),
            "memory": _most(result.peak_bytes for result in every),
            "step_time": _median(result.step_seconds for result in every),
        }
        return Line(row.section, row.name, False, status, facts, numbers, frozenset(row.home))


def _number(results: list[Result], metric: str) -> Number | None:
    """One seed's with its bootstrap, or the mean over seeds with the 95 % interval of the mean; all must be known."""
    values = [result.values.get(metric) for result in results]
    known = [100 * value for value in values if value is not None]
    if len(known) < len(values):
        return None
    if len(known) == 1:
        spread = results[0].intervals.get(metric)
        low, high = (None, None) if spread is None else (spread.get("low"), spread.get("high"))
        return Number(known[0], *(None if edge is None else 100 * edge for edge in (low, high)))
    mean = statistics.fmean(known)
    half = float(student.ppf(0.975, len(known) - 1)) * statistics.stdev(known) / math.sqrt(len(known))
    return Number(mean, mean - half, mean + half)


def _most(values: Iterator[int | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _median(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


@dataclass(frozen=True)
class Shown:
    """A cell as text."""

    text: str
    best: bool = False
    interval: str = ""


def write_table(folder: Path, table: Table) -> Path:
    """Write table.csv, table.md and table.html; returns the last."""
    study, lines = table.study, list(table.lines())
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "table.csv", study, lines)
    sections: dict[str, list[Mapping[str, object]]] = {}
    for line in lines:
        alike = [other for other in lines if other.section == line.section and not other.quoted]
        row = {
            "name": f"{line.name} ({QUOTED})" if line.quoted else line.name,
            "quoted": line.quoted,
            "facts": [_fact(column, line.facts.get(column)) for column in study.columns],
            "cells": [_shown(study, line, key, alike) for key in _keys(study)],
        }
        sections.setdefault(line.section, []).append(row)
    content = {
        "title": study.title,
        "notes": _notes(study, lines),
        "data_sets": list(study.data_sets),
        "metrics": [SUMMARY[metric] for metric in study.metrics],
        "columns": [COLUMNS[column] for column in study.columns],
        "sections": sections,
    }
    here = Path(__file__).parent
    write_text(folder / "table.md", markdown_templates(here).get_template("table.md.j2").render(content))
    write_text(folder / "table.html", html_templates(here).get_template("table.html.j2").render(content))
    return folder / "table.html"


def _keys(study: StudyConfig) -> list[tuple[str, str]]:
    return [(name, metric) for name in study.data_sets for metric in study.metrics]


def _notes(study: StudyConfig, lines: list[Line]) -> list[str]:
    """Notes of the study, and how to read the table."""
    found = [*study.notes, "Metrics in percent; the best of a column is bold."]
    if len(study.seeds) > 1:
        found.append(f"Means over {len(study.seeds)} seeds, ± half the 95 % interval of the mean (Student's t).")
    elif study.intervals:
        found.append("In brackets the 95 % interval of the bootstrap.")
    if any(line.home for line in lines):
        found.append("* marks a data set of the domain that the model was trained on last.")
    if any(line.quoted for line in lines):
        found.append(f"Rows “{QUOTED}” are another publication's numbers, not measured here.")
    missing = [f"{line.name} ({line.status})" for line in lines if line.status != "ok"]
    if missing:
        found.append(f"Not complete: {', '.join(missing)}.")
    return found


def _shown(study: StudyConfig, line: Line, key: tuple[str, str], alike: list[Line]) -> Shown:
    """A number to one decimal; best among the measured ones of its section, if there are several."""
    number = line.numbers.get(key)
    if number is None:
        return Shown("–" if line.status == "ok" else line.status)
    values = [found.value for other in alike if (found := other.numbers.get(key)) is not None]
    best = not line.quoted and len(values) > 1 and f"{number.value:.1f}" == f"{max(values):.1f}"
    text = f"{number.value:.1f}" + ("*" if key[0] in line.home else "")
    if number.low is None or number.high is None:
        return Shown(text, best)
    if len(study.seeds) > 1:
        return Shown(f"{text} ± {(number.high - number.low) / 2:.1f}", best)
    return Shown(text, best, f"({number.low:.1f}, {number.high:.1f})" if study.intervals else "")


def _fact(column: Column, value: float | None) -> str:
    if value is None:
        return "–"
    if column == "parameters":
        return f"{value / 1e6:.2f}M" if value >= 10_000 else f"{value:,.0f}"
    return f"{value / 2**30:.2f} GiB" if column == "memory" else f"{1000 * value:.4g} ms"


def _write_csv(path: Path, study: StudyConfig, lines: list[Line]) -> None:
    header = ["section", "method", "quoted", "status", "parameters", "peak_bytes", "seconds_per_step", "seeds"]
    header += [f"{name} {metric}{edge}" for name, metric in _keys(study) for edge in ("", " low", " high")]
    rows = []
    for line in lines:
        numbers = [line.numbers.get(key) for key in _keys(study)]
        edges = [edge for n in numbers for edge in ((None,) * 3 if n is None else (n.value, n.low, n.high))]
        facts = [line.facts.get(column) for column in COLUMNS]
        seeds = None if line.quoted else len(study.seeds)
        rows.append([line.section, line.name, "yes" if line.quoted else "no", line.status, *facts, seeds, *edges])
    write_csv(path, header, rows)

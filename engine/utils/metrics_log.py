"""Rows of a run's metrics.jsonl."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from .documents import Within, as_schema, parse_json

log = logging.getLogger(__name__)


@dataclass
class _Row:
    """What every row has; the rest are numbers, lists of numbers, or null."""

    step: Annotated[int, Within(0)]
    images_per_s: float | None = None
    peak_bytes: list[float] | None = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that a killed process left unfinished is dropped."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines):
            if not line:
                continue
            try:
                row = parse_json(line)
                as_schema(_Row, row)
                as_schema(dict[str, float | list[float | None] | None], row)
                rows.append(row)
            except ValueError:
                if number < len(lines) - 1:
                    log.info(f"{path}:{number + 1}: not a row of metrics, ignored")
    return rows

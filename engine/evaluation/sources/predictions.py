"""Probabilities made elsewhere: a CSV file in place of a model and its images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ...data.tables import Line, Table
from ...distributed.deepspeed import World
from ...utils.errors import UserError
from ...utils.tables import csv_text
from ..config import EvaluateConfig
from ..scoring import Scores
from . import SOURCES
from ._base import Method, Source, Split

log = logging.getLogger(__name__)


class TableOfProbabilities(Method):
    """A table of probabilities; it has no features, and no baselines."""

    context = "unknown"

    def __init__(self, config: EvaluateConfig) -> None:
        assert config.predictions is not None
        self.path = Path(config.predictions)
        self.name = config.method or self.path.name.removesuffix(".gz").removesuffix(".csv")
        self.about = f"gave its probabilities to this evaluation as a table, {self.path.name}; no model was run."
        self.settings = {"predictions": config.predictions, "batch_size": None}

    def scores(self, config: EvaluateConfig, split: Split, world: World) -> tuple[Scores, dict[str, str]] | None:
        if world.rank != 0:
            return None
        ids = [sample.id for sample in split.manifest.samples]
        names = [name for names in split.class_lists for name in names]
        return read_predictions(self.path, ids, split.labels, names, skip=config.on_bad_image == "skip"), {}


def read_predictions(
    path: Path, ids: Sequence[str], labels: NDArray[np.float32], names: Sequence[str], *, skip: bool
) -> Scores:
    """Rows of a table, matched to images by their ids, in the order of the images; features (N,0).

    Ids and classes that are not asked for are left out, and counted on standard error.

    Args:
        path: .csv or .csv.gz with the columns `id` and class names, in any order, as `predict` and reports write it.
        ids: N image ids.
        labels: (N,C) in {1, 0, -1}.
        names: C class names.
        skip: leave out images that have no row; else they are an error.

    Raises:
        UserError: unreadable table; a missing or doubled id or class; a value that is no number in [0, 1]. It names
            the file, and the row or column.
    """
    table = Table(path, ["id"])
    columns = _columns(table, names)
    # As tables are written.
    known = {csv_text(name): name for name in ids} | {name: name for name in ids}
    place: dict[str, int] = {}
    found: dict[str, list[float]] = {}
    extra = 0
    for line in table:
        name = known.get(line.cells["id"])
        if name is None:
            extra += 1
            continue
        if name in place:
            raise UserError(f"{path}:{line.number}: id {name!r} is already on line {place[name]}")
        place[name] = line.number
        found[name] = [_probability(line, column) for column in columns]
    missing = [name for name in ids if name not in found]
    if missing and not (skip and found):
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(
            f"{path}: has no row for id {missing[0]!r}{more} of the manifest's {len(ids)} images"
            + ("; set on_bad_image to skip to leave them out" if found else "")
        )
    if missing:
        log.info(f"{path}: {len(missing)} images have no row and were left out, the first {missing[0]!r}")
    unused = len(table.columns) - 1 - len(columns)
    if extra or unused:
        log.info(f"{path}: {extra} rows and {unused} columns that were not asked for were left out")
    kept = [row for row, name in enumerate(ids) if name in found]
    return Scores(
        [ids[row] for row in kept],
        np.array([found[ids[row]] for row in kept], dtype=np.float64).reshape(len(kept), len(names)),
        labels[kept].astype(np.float64),
        np.empty((len(kept), 0), dtype=np.float32),
    )


def _columns(table: Table, names: Iterable[str]) -> list[str]:
    """The table's column of each class."""
    columns = []
    for name in names:
        column = name if name in table.columns else csv_text(name)
        if column not in table.columns or column == "id":
            near = get_close_matches(name, table.columns, n=1)
            raise UserError(f"{table.path}: has no column {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if table.columns.count(column) > 1:
            raise UserError(f"{table.path}: has two columns {name!r}; remove one")
        columns.append(column)
    return columns


def _probability(line: Line, column: str) -> float:
    try:
        value = float(line[column])
    except ValueError:
        value = np.nan
    if not 0 <= value <= 1:
        raise UserError(f"{line.path}:{line.number}: column {column!r} holds {line[column]!r}, no number in [0, 1]")
    return value


@SOURCES.register
class PredictionsFile(Source):
    """A CSV file with the columns `id` and class names."""

    name = "predictions"

    @classmethod
    def open(cls, config: EvaluateConfig, device: torch.device, autocast: torch.dtype | None) -> Method:
        return TableOfProbabilities(config)

"""A folder of images of one's own, with a table or without.

With a table (CSV, plain or .gz): the column `path` holds image files relative to the source. The columns `patient_id`,
`split` (train, val or test) and `text` (a report's impression) are used where they exist; all others are classes, with
1, 0, -1 (uncertain) or nothing (not mentioned) in their cells. Without a column `split` patients are split by a hash;
without `patient_id` images are split one by one.

Without a table: all images below the source, without labels, as the split `test`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...utils.errors import UserError
from ..file_names import is_shadow, plain_path
from ..preparation.dataset import DataSet, SplitConfig
from ..preparation.rows import Journal, Row
from ..preparation.splits import SPLITS, split_by_hash
from ..tables import Line, Table

SUFFIXES = {".png", ".jpg", ".jpeg", ".dcm", ".dicom"}


@dataclass(kw_only=True)
class FolderConfig(SplitConfig):
    """Manifests from a folder of images and a CSV table of paths and labels, or from the images alone."""

    table: str | None = None
    """CSV file, one image a line; null: images only, without labels"""
    path_column: str = "path"
    """column of the image files, relative to the source"""
    patient_column: str = "patient_id"
    """column of the patients; no patient gets into two splits"""
    split_column: str = "split"
    """column of train, val or test"""
    text_column: str = "text"
    """column of the texts for phase 1"""
    ignore_columns: list[str] = field(default_factory=list)
    """columns that are no classes"""


def read(config: FolderConfig, journal: Journal) -> tuple[list[str], Iterator[Row]]:
    """Class names in the order of the columns, and all rows."""
    if config.table is None:
        return [], _images(Path(config.source), journal)
    table = Table(Path(config.table), [config.path_column])
    special = {config.path_column, config.patient_column, config.split_column, config.text_column}
    classes = [name for name in table.columns if name and name not in special | set(config.ignore_columns)]
    for name in config.ignore_columns:
        if name not in table.columns:
            raise UserError(f"ignore_columns: {config.table} has no column {name!r}")
    if config.patient_column not in table.columns and config.split_column not in table.columns:
        journal.warn(
            f"no column {config.patient_column!r}: images are split one by one, and one patient's may be in two splits"
        )
    return classes, (_row(line, classes, config) for line in table)


def _row(line: Line, classes: list[str], config: FolderConfig) -> Row:
    path = plain_path(line[config.path_column])
    if not path or path.startswith("/") or path[1:3] == ":/" or ".." in path.split("/"):
        raise UserError(f"{line.path}:{line.number}: column {config.path_column!r} must be a path below the source")
    patient = line.get(config.patient_column) or None
    fractions = {"test": config.test_fraction, "val": config.val_fraction}
    split = line.get(config.split_column)
    if split is None:
        split = split_by_hash(patient or path, config.seed, fractions)
    elif split not in SPLITS:
        raise UserError(f"{line.path}:{line.number}: column {config.split_column!r} must be train, val or test")
    return Row(
        id=path,
        filepath=path,
        split=split,
        place=line.place,
        labels=line.labels(classes) if classes else None,
        patient=patient,
        text=line.get(config.text_column) or None,
    )


def _images(source: Path, journal: Journal) -> Iterator[Row]:
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if is_shadow(path.relative_to(source)):
            continue
        if path.suffix.lower() in SUFFIXES:
            yield Row(id=name, filepath=name, split="test", place=name)
        elif path.is_file():
            journal.drop("not an image (png, jpg, jpeg, dcm, dicom)", "", name)


DATASET = DataSet("folder", "manifests from images and a table of your own", FolderConfig, read)

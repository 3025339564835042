"""A folder of images of one's own, with a table or without.

With a table (CSV, plain or .gz): the column `path` holds image files relative to the source. The columns `patient_id`,
`split` (train, val or test) and `text` (a report's impression) are used where they exist; all others are classes, with
1, 0, -1 (uncertain) or nothing (not mentioned) in their cells. `table.py` reads it, and other tables too.

Without a table: all images below the source, without labels, as the split `test`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from ..file_names import is_shadow
from ..preparation.dataset import DataSet, SplitConfig
from ..preparation.rows import Journal, Row
from .table import TableConfig
from .table import read as read_table

SUFFIXES = {".png", ".jpg", ".jpeg", ".dcm", ".dicom"}


@dataclass(kw_only=True)
class FolderConfig(SplitConfig):
    """Manifests from a folder of images and a CSV table of paths and labels, or from the images alone."""

    source: str = ""
    """folder of the images; paths of the table are relative to it"""
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
    return read_table(TableConfig(**{field.name: getattr(config, field.name) for field in fields(config)}), journal)


def _images(source: Path, journal: Journal) -> Iterator[Row]:
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if is_shadow(path.relative_to(source)):
            continue
        if path.suffix.lower() in SUFFIXES:
            yield Row(id=name, filepath=name, split="test", place=name)
        elif path.is_file():
            journal.drop("not an image (png, jpg, jpeg, dcm, dicom)", "", name)


DATASET = DataSet(
    "folder",
    "manifests from images and a table of your own",
    FolderConfig,
    read,
    "--source images --table labels.csv --output data/own",
)

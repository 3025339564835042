"""Any CSV table (plain or .gz) with an image a line, or several tables, one a split.

The image's path is a cell, or made of several (`files/p{subject_id:.2}/p{subject_id}/s{study_id}/{dicom_id}.jpg`).
Labels are columns of 1, 0, -1 (uncertain) or nothing (not mentioned), also spelled true, yes, nan and the like, or as
`label_values` says; or one column of names (`Edema|Effusion`), where an image may have several lines. Classes that one
of several tables lacks are null there; those without any label in training are listed in `unseen.txt`, the others in
`seen.txt`. Without a split, patients are split by a hash; without patients, images one by one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter

from ...utils.errors import UserError
from ...utils.parser_messages import meant
from ..file_names import plain_path
from ..preparation.dataset import DataSet, SplitConfig
from ..preparation.rows import Journal, Labels, Row
from ..preparation.splits import SPLITS, split_by_hash
from ..tables import Line, Table

WORDS = {
    **dict.fromkeys(("true", "yes"), 1),
    **dict.fromkeys(("false", "no"), 0),
    **dict.fromkeys(("", "nan", "na", "n/a", "none", "null"), None),
}
"""what is read as a label besides numbers, whatever its case"""


@dataclass(kw_only=True)
class TableConfig(SplitConfig):
    """Manifests from any CSV table: one column a class, or a column of class names."""

    source: str = ""
    """folder that the paths of the table are relative to"""
    table: str | dict[str, str] = ""
    """CSV file, one image a line; or one a split, {train: FILE, val: FILE, test: FILE}"""
    path_column: str = "path"
    """column of the image files, relative to the source; or a pattern of columns in braces, {dicom_id}.jpg, where
    {subject_id:.2} takes the first two characters"""
    patient_column: str = "patient_id"
    """column of the patients; no patient gets into two splits"""
    split_column: str = "split"
    """column of train, val or test; not used with one table a split"""
    split_values: dict[str, str] = field(default_factory=dict)
    """other words of that column → train, val or test, such as {dev: val}"""
    text_column: str = "text"
    """column of the texts for phase 1"""
    label_columns: list[str] | None = None
    """columns that are classes; null: all others"""
    ignore_columns: list[str] = field(default_factory=list)
    """columns that are no classes"""
    names_column: str | None = None
    """column of the names of the classes that an image has, in place of a column a class; several lines of an image are
    taken together, and classes that none of them names are 0"""
    separator: str = "|"
    """what stands between two names there; brackets and quotes around names are left out"""
    label_values: dict[str, int | None] = field(default_factory=dict)
    """words of the class columns → 1, 0, -1 or null, besides 1, 0, -1, true, false, yes, no, nan and empty"""
    keep: dict[str, str | list[str]] = field(default_factory=dict)
    """column → values of the lines to keep, such as {ViewPosition: [PA, AP]}; other lines are left out"""


SPECIAL = ("path_column", "patient_column", "split_column", "text_column", "names_column")


def read(config: TableConfig, journal: Journal) -> tuple[list[str], Iterator[Row]]:
    """Class names in the order of the columns (of the names, in alphabetical order), and all rows.

    Raises:
        UserError: a column that is missing or a cell that is no label, with file, line and column.
    """
    if not config.table:
        raise UserError("table: is required; give --table FILE")
    split_of = {"": config.table} if isinstance(config.table, str) else config.table
    for name, key in [(name, "table") for name in split_of if name] + [
        (name, "split_values") for name in config.split_values.values()
    ]:
        if name not in SPLITS:
            raise UserError(f"{key}: {name!r} is not one of {', '.join(SPLITS)}")
    for word, value in config.label_values.items():
        if value not in (1, 0, -1, None):
            raise UserError(f"label_values: {word} must become 1, 0, -1 or null, got {value}")
    tables = {split: Table(Path(file)) for split, file in split_of.items()}
    pattern = _Pattern(config.path_column)
    for table in tables.values():
        _check_columns(table, config, pattern)
    columns = {column for table in tables.values() for column in table.columns}
    _check_options(config, columns, tables)
    if config.patient_column not in columns and config.split_column not in columns and "" in tables:
        journal.warn(
            f"no column {config.patient_column!r}: images are split one by one, and one patient's may be in two splits"
        )
    if config.names_column is not None:
        return _from_names(tables, config, pattern, journal)
    classes = _classes(tables, config, pattern)
    for split, table in tables.items():
        lost = [name for name in classes if name not in table.columns]
        if lost:
            journal.warn(f"{table.path.name} has no labels of {', '.join(lost)}: null in {split}")
    levels = {**WORDS, **{word.strip().casefold(): value for word, value in config.label_values.items()}}

    def rows() -> Iterator[Row]:
        for split, line in _lines(tables, config, journal):
            labels = [_level(line, name, levels) if name in line.cells else None for name in classes]
            yield _row(line, split, labels if classes else None, config, pattern)

    return classes, rows()


class _Pattern:
    """A column's name, or a text with columns in braces."""

    def __init__(self, text: str) -> None:
        try:
            self._parts = [(before, name, spec or "") for before, name, spec, _ in Formatter().parse(text)]
        except ValueError as error:
            raise UserError(f"path_column: {text!r} is no pattern: {error}") from None
        self.columns = [name for _, name, _ in self._parts if name is not None] or [text]
        self._made = self.columns != [text]
        for _, name, spec in self._parts:
            if name == "" or not re.fullmatch(r"(\.\d+)?", spec):
                raise UserError(f"path_column: {text!r}: braces hold a column, or one and a length, {{COLUMN:.2}}")

    def path(self, line: Line) -> str:
        """The path of a line's image; empty: a cell of it is empty."""
        cells = {name: line[name] for name in self.columns}
        if not all(cells.values()):
            return ""
        if not self._made:
            return cells[self.columns[0]]
        return "".join(before + (format(cells[name], spec) if name else "") for before, name, spec in self._parts)


def _check_columns(table: Table, config: TableConfig, pattern: _Pattern) -> None:
    wanted = {
        "path_column": pattern.columns,
        "names_column": [config.names_column] if config.names_column else [],
        "keep": list(config.keep),
    }
    for key, names in wanted.items():
        for name in names:
            if name not in table.columns:
                near = meant(name, table.columns)
                raise UserError(
                    f"{table.path}: has no column {name!r} in its first line, whose cells commas must separate{near}; "
                    f"--{key} says which"
                )
            if table.columns.count(name) > 1:
                raise UserError(f"{table.path}: has two columns {name!r}; rename one")


def _check_options(config: TableConfig, columns: set[str], tables: dict[str, Table]) -> None:
    """Columns that may be missing must be there once they are named."""
    files = " and ".join(str(table.path) for table in tables.values())
    for key in ("patient_column", "split_column", "text_column"):
        name = getattr(config, key)
        if name != getattr(TableConfig, key) and name not in columns:
            raise UserError(f"{key}: {files} has no column {name!r}{meant(name, columns)}")
    for key in ("label_columns", "ignore_columns"):
        for name in getattr(config, key) or []:
            if name not in columns:
                raise UserError(f"{key}: {files} has no column {name!r}{meant(name, columns)}")


def _classes(tables: dict[str, Table], config: TableConfig, pattern: _Pattern) -> list[str]:
    """Class names of all tables, each once; one that stands twice in a table stays twice, to be refused."""
    if config.label_columns is not None:
        return list(config.label_columns)
    special = {getattr(config, key) for key in SPECIAL} | set(pattern.columns) | {*config.ignore_columns, *config.keep}
    classes: list[str] = []
    for table in tables.values():
        known = set(classes)
        classes += [name for name in table.columns if name and name not in special and name not in known]
    return classes


def _lines(tables: dict[str, Table], config: TableConfig, journal: Journal) -> Iterator[tuple[str, Line]]:
    """Split (empty: not known yet) and line of every line to keep."""
    keep = {name: {words} if isinstance(words, str) else set(words) for name, words in config.keep.items()}
    for split, table in tables.items():
        for line in table:
            lost = next((name for name, words in keep.items() if line[name] not in words), None)
            if lost is None:
                yield split, line
            else:
                journal.drop(f"{lost} is not among those to keep", line.place, "")


def _row(line: Line, split: str, labels: Labels | None, config: TableConfig, pattern: _Pattern) -> Row:
    path = plain_path(pattern.path(line))
    if not path or path.startswith("/") or path[1:3] == ":/" or ".." in path.split("/"):
        raise UserError(f"{line.path}:{line.number}: column {config.path_column!r} must be a path below the source")
    patient = line.get(config.patient_column) or None
    return Row(
        id=path,
        filepath=path,
        split=split or _split(line, patient or path, config),
        place=line.place,
        labels=labels,
        patient=patient,
        text=line.get(config.text_column) or None,
    )


def _split(line: Line, key: str, config: TableConfig) -> str:
    word = line.get(config.split_column)
    if word is None:
        return split_by_hash(key, config.seed, {"test": config.test_fraction, "val": config.val_fraction})
    split = config.split_values.get(word, word)
    if split not in SPLITS:
        raise UserError(
            f"{line.path}:{line.number}: column {config.split_column!r} must be train, val or test; say what "
            "other words mean with --split_values"
        )
    return split


def _level(line: Line, name: str, levels: dict[str, int | None]) -> int | None:
    cell = line[name].casefold()
    if cell in levels:
        return levels[cell]
    try:
        number = float(cell)
    except ValueError:
        number = math.inf
    if number not in (1, 0, -1):
        raise UserError(
            f"{line.path}:{line.number}: column {name!r} must be 1, 0, -1 or empty; say what other words mean with "
            "--label_values, or that it is no class with --ignore_columns"
        )
    return int(number)


def _from_names(
    tables: dict[str, Table], config: TableConfig, pattern: _Pattern, journal: Journal
) -> tuple[list[str], Iterator[Row]]:
    assert config.names_column is not None
    if not config.separator.strip():
        raise UserError("separator: must hold a character that is no space")
    rows: dict[str, Row] = {}
    names: dict[str, set[str]] = {}
    for split, line in _lines(tables, config, journal):
        row = _row(line, split, None, config, pattern)
        first = rows.setdefault(row.id, row)
        if (first.split, first.patient) != (row.split, row.patient):
            raise UserError(f"{line.path}:{line.number}: another split or patient than {first.place} gives this image")
        found = (word.strip(" []'\"") for word in line[config.names_column].split(config.separator))
        names.setdefault(row.id, set()).update(word for word in found if word)
    classes = sorted(set().union(*names.values()), key=str.casefold)

    def labelled() -> Iterator[Row]:
        for key, row in rows.items():
            row.labels = _present(names[key], classes)
            yield row

    return classes, labelled()


def _present(names: set[str], classes: Sequence[str]) -> Labels:
    return [int(name in names) for name in classes]


DATASET = DataSet(
    "table",
    "manifests from any CSV table",
    TableConfig,
    read,
    "--source images --table labels.csv --path_column file_name --output data/own",
)

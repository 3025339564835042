"""Official tables: CSV files, plain or gzipped, read line by line."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, cast

from tqdm import tqdm

from ..utils.errors import UserError
from ..utils.text import printable

LONGEST_LINE = 16 * 2**20
"""characters"""
LEVELS = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1, "": None}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table: its cells by column, and where it stands."""

    path: Path
    number: int
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column].strip()

    def get(self, column: str) -> str | None:
        """The cell, or None where the table has no such column."""
        return self[column] if column in self.cells else None

    @property
    def place(self) -> str:
        """File and line."""
        return f"{self.path.name}:{self.number}"

    def labels(self, columns: Sequence[str]) -> list[int | None]:
        """The cells of `columns` as 1, 0, -1 or, where empty, None.

        Raises:
            UserError: another value.
        """
        try:
            return [LEVELS[self[column]] for column in columns]
        except KeyError:
            bad = next(column for column in columns if self[column] not in LEVELS)
            raise UserError(f"{self.path}:{self.number}: column {bad!r} must be 1, 0, -1 or empty") from None


class Table:
    """A CSV file with a header; iterate over its lines as often as needed."""

    def __init__(self, path: Path, columns: Sequence[str] = ()) -> None:
        """
        Args:
            path: .csv or .csv.gz, UTF-8.
            columns: those it must have.

        Raises:
            UserError: unreadable, empty, or without one of `columns`, or with two of its name.
        """
        self.path = path
        _, header = next(self._records(), (0, []))
        self.columns = [name.strip() for name in header]
        for column in columns:
            if column not in self.columns:
                raise UserError(f"{path}: has no column {column!r} in its first line, whose cells commas must separate")
            if self.columns.count(column) > 1:
                raise UserError(f"{path}: has two columns {column!r}; rename one")

    def __iter__(self) -> Iterator[Line]:
        """
        Raises:
            UserError: a line with more or fewer cells than the header, broken text or a broken archive.
        """
        records = self._records()
        next(records)
        for number, record in tqdm(records, f"reading {printable(self.path.name)}", delay=2, disable=None, leave=False):
            if not record:
                continue
            if len(record) != len(self.columns):
                raise UserError(f"{self.path}:{number}: {len(record)} cells, the header has {len(self.columns)}")
            yield Line(self.path, number, dict(zip(self.columns, record, strict=True)))

    def _lines(self, file: TextIO, record: list[int]) -> Iterator[str]:
        """Lines of an open file; a record without end, quoted line ends or not, is refused before it is in memory.

        `record` holds the characters of the present record; who reads the records sets it back to 0.
        """
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            record[0] += len(line)
            if record[0] > LONGEST_LINE:
                raise UserError(f"{self.path}:{number}: longer than {LONGEST_LINE >> 20} MiB, which no line is")
            yield line

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        opener = gzip.open if self.path.suffix == ".gz" else open
        number = 0
        try:
            with opener(self.path, "rt", encoding="utf-8-sig", newline="") as file:
                size = [0]
                reader = csv.reader(self._lines(cast(TextIO, file), size), strict=True)
                for record in reader:
                    size[0] = 0
                    number = reader.line_num
                    yield number, record
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: not UTF-8 text (after line {number})") from None
        except csv.Error as error:
            raise UserError(f"{self.path}: not a CSV table: {error} (after line {number})") from None
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise UserError(f"{self.path}: a broken gzip file (after line {number}); download it again") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror or error}") from None


def find_table(folder: str | Path, *names: str) -> Path:
    """The one file of `folder` that has one of `names` (shell patterns), plain or with .gz.

    Raises:
        UserError: no such folder, none or several.
    """
    if not Path(folder).is_dir():
        raise UserError(f"source: {folder} is no folder; name the one that the data set was downloaded to")
    found = find_tables(folder, *names)
    if not found:
        raise UserError(f"source: {folder} holds no {' or '.join(names)} (nor .gz); name the folder of the tables")
    if len(found) > 1:
        raise UserError(f"source: {folder} holds {' and '.join(path.name for path in found)}; keep one of them")
    return found[0]


def find_tables(folder: str | Path, *names: str) -> list[Path]:
    """All files of `folder` that have one of `names` (shell patterns), plain or with .gz."""
    return [path for name in names for suffix in ("", ".gz") for path in sorted(Path(folder).glob(name + suffix))]

"""Measured rows, and the folder that keeps them: rows.csv, rows.json, environment.json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pspg.engine.utils.errors import UserError
from pspg.engine.utils.files import write_text

OK, FAILED, UNAVAILABLE, TOO_LARGE, NOT_RUN = "ok", "FAILED", "unavailable", "does not fit", "not run"
SAME = ("commit", "machine", "versions", "device")
"""what of the environment must not change within a folder"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One provider of one case in one direction."""

    job: str
    """key of the job that measured it"""
    suite: str
    """operators, steps, growth, pipeline"""
    operator: str
    provider: str
    """reference, repaired, eager, compiled, triton; a loader's name"""
    direction: str = "both"
    """forward, backward, both"""
    C: int | None = None
    B: int | None = None
    n: int | None = None
    device: str = "cpu"
    dtype: str = "fp32"
    status: str = OK
    detail: str = ""
    """why a row has no numbers, or what else belongs to them"""
    repeats: int = 0
    p20: float | None = None
    """seconds, as p50 and p80"""
    p50: float | None = None
    p80: float | None = None
    peak_bytes: int | None = None
    """beyond what was there before the call"""
    flops: int | None = None
    """of the exact algebra, nothing computed twice"""
    bytes: int | None = None
    """inputs read once, outputs and gradients written once"""
    roofline: float | None = None
    """the larger of flops / peak and bytes / bandwidth, over p50: 1 is as fast as this device could be"""
    error: float | None = None
    """largest error of the gate over what it allows; above 1 the row is FAILED"""


class Results:
    """A folder of rows that a later run continues.

    Args:
        folder: made where it is not there.
        environment: what the rows depend on.

    Raises:
        UserError: the folder holds other files, or rows of another environment.
    """

    def __init__(self, folder: Path, environment: dict[str, Any]) -> None:
        self.folder, self.environment, self.rows = folder, environment, []
        known = folder / "environment.json"
        if known.is_file():
            self._continue(known)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: is not a folder of results; choose a new one")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._write_environment()

    def _continue(self, known: Path) -> None:
        earlier = _read(known)
        for key in SAME:
            if earlier.get(key) != self.environment.get(key):
                raise UserError(f"{self.folder}: holds results of another {key}; choose a new folder")
        self.environment = earlier
        self.rows = read_rows(self.folder) if (self.folder / "rows.json").is_file() else []

    rows: list[Row]

    def done(self) -> set[str]:
        """Keys of the jobs whose rows are there."""
        return {row.job for row in self.rows}

    def add(self, rows: Iterable[Row]) -> None:
        """Keep the rows of a job, on disk before this returns."""
        self.rows += rows
        write_text(self.folder / "rows.json", json.dumps([asdict(row) for row in self.rows], indent=1) + "\n")
        write_text(self.folder / "rows.csv", to_csv(self.rows))

    def note(self, **facts: Any) -> None:
        """Add to the environment, such as measured peaks."""
        self.environment = {**self.environment, **facts}
        self._write_environment()

    def _write_environment(self) -> None:
        write_text(self.folder / "environment.json", json.dumps(self.environment, indent=2) + "\n")


def read_rows(folder: Path) -> list[Row]:
    """Rows of a results folder.

    Raises:
        UserError: no results, or not of this form.
    """
    try:
        return [Row(**row) for row in _read(folder / "rows.json")]
    except TypeError:
        raise UserError(f"{folder / 'rows.json'}: rows of another version of the benchmarks; measure anew") from None


def read_environment(folder: Path) -> dict[str, Any]:
    """What a results folder says about its machine, versions and commit.

    Raises:
        UserError: no results.
    """
    found: dict[str, Any] = _read(folder / "environment.json")
    return found


def to_csv(rows: Iterable[Row]) -> str:
    """A table with a header line; empty cells for what is not there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def without_numbers(row: Row, status: str, detail: str) -> Row:
    """The row of something that did not run, or whose numbers must not be shown."""
    return replace(row, status=status, detail=detail, repeats=0, p20=None, p50=None, p80=None, peak_bytes=None)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a folder that the benchmarks wrote") from None
    except ValueError:
        raise UserError(f"{path}: is not JSON") from None

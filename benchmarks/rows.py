"""Measured rows, and the file that keeps them with what they depend on: machine, versions, commit, measured peaks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pspg.engine.errors import UserError
from pspg.engine.files import write_text

OK, FAILED, UNAVAILABLE, TOO_LARGE, NOT_RUN = "ok", "FAILED", "unavailable", "does not fit", "not run"
SAME = ("commit", "machine", "versions", "device")
"""what of the environment must not change within a file"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation of one case in one direction."""

    job: str
    """key of the job that measured it; it starts with the group, such as operators or steps"""
    operator: str
    impl: str
    """implementation; `-` for a job that broke before any started"""
    direction: str = "both"
    """forward, backward, both"""
    sizes: Mapping[str, int]
    """letter → size: C, B and n, and the others that were chosen"""
    device: str = "cpu"
    dtype: str = "fp32"
    status: str = OK
    detail: str = ""
    """why there are no numbers, or what else belongs to them"""
    repeats: int = 0
    p20: float | None = None
    """seconds, as p50 and p80"""
    p50: float | None = None
    p80: float | None = None
    peak_bytes: int | None = None
    """beyond what was held before the call"""
    flops: int | None = None
    """of the exact algebra, nothing computed twice"""
    bytes: int | None = None
    """inputs read once, outputs and gradients written once"""
    roofline: float | None = None
    """the larger of flops / peak and bytes / bandwidth, over p50"""
    error: float | None = None
    """largest error over what the gate allows; above 1 the row is FAILED"""

    @property
    def group(self) -> str:
        """Part of the results that the row belongs to."""
        return self.job.partition("/")[0]

    @property
    def shape(self) -> str:
        """Such as C14 B16 n16."""
        return " ".join(f"{letter}{size}" for letter, size in self.sizes.items())

    @property
    def measured(self) -> bool:
        """Whether there is a time to show; a difference of two times can be zero."""
        return self.status == OK and bool(self.p50)

    def without_numbers(self, status: str, detail: str, error: float | None = None) -> Row:
        """The row of something that did not run, or whose numbers must not be shown."""
        empty = dict.fromkeys(("p20", "p50", "p80", "peak_bytes"))
        return replace(self, status=status, detail=detail, error=error, repeats=0, **empty)


class Results:
    """A file of rows that a later run continues.

    Args:
        path: made where it is not there.
        environment: what the rows depend on.

    Raises:
        UserError: the file is no results file, or holds rows of another environment.
    """

    def __init__(self, path: Path, environment: dict[str, Any]) -> None:
        self.path, self.content = path, {"environment": environment, "rows": []}
        if path.exists():
            self.content = read_results(path)
            for key in SAME:
                if self.content["environment"].get(key) != environment.get(key):
                    raise UserError(f"{path}: holds results of another {key}; choose a new folder")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def environment(self) -> dict[str, Any]:
        found: dict[str, Any] = self.content["environment"]
        return found

    @property
    def rows(self) -> list[Row]:
        found: list[Row] = self.content["rows"]
        return found

    def add(self, rows: Iterable[Row]) -> None:
        """Keep the rows of a job, on disk before this returns."""
        self.rows.extend(rows)
        write_results(self.path, self.content)


def write_results(path: Path, content: Mapping[str, Any]) -> None:
    """Write environment, rows (one a line, without what is not there) and any other parts as JSON."""
    standard = {field.name: field.default for field in fields(Row) if field.default is not MISSING}
    rows = [{k: v for k, v in asdict(row).items() if k not in standard or v != standard[k]} for row in content["rows"]]
    parts = [f'"{key}": {json.dumps(value, indent=1)}' for key, value in content.items() if key != "rows"]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_text(path, "{\n" + ",\n".join([*parts, f'"rows": [\n{lines}\n]']) + "\n}\n")


def read_results(path: Path) -> dict[str, Any]:
    """Parts of a results file: `environment`, `rows`, and others such as `scaling`.

    Args:
        path: the file, or the folder that holds it as results.json.

    Raises:
        UserError: no results, or not of this version.
    """
    path = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text())
        return {**content, "environment": content["environment"], "rows": [Row(**row) for row in content["rows"]]}
    except OSError:
        raise UserError(f"{path}: cannot be read; give a file or folder that benchmarks.run wrote") from None
    except ValueError:
        raise UserError(f"{path}: is not JSON") from None
    except (KeyError, TypeError):
        raise UserError(f"{path}: is not a results file of this version; measure anew") from None

"""Measured rows, and the file that keeps them with their environment: machine, versions, commit, measured peaks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pspg.engine.utils.errors import UserError
from pspg.engine.utils.files import write_text

OK, FAILED, UNAVAILABLE, TOO_LARGE = "ok", "FAILED", "unavailable", "does not fit"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation of one case in one direction."""

    job: str
    """key of the job that measured it; it starts with the group, such as operators or growth"""
    operator: str
    impl: str
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
    """FLOPs of the exact algebra, nothing computed twice"""
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
        """Such as C14 B16 n16 fp32."""
        return " ".join([*(f"{letter}{size}" for letter, size in self.sizes.items()), self.dtype])

    @property
    def measured(self) -> bool:
        """True if there is a time to show; a difference of two times can be zero."""
        return self.status == OK and bool(self.p50)

    def without_numbers(self, status: str, detail: str) -> Row:
        """The row of something that did not run, or whose numbers must not be shown."""
        row = replace(self, status=status, detail=detail, repeats=0, p20=None, p50=None, p80=None)
        return replace(row, peak_bytes=None, roofline=None)


def write_results(path: Path, content: Mapping[str, Any]) -> None:
    """Write environment, rows (one a line, without what is not there) and any other parts as JSON."""
    standard = {field.name: field.default for field in fields(Row) if field.default is not MISSING}
    rows = [{k: v for k, v in asdict(row).items() if k not in standard or v != standard[k]} for row in content["rows"]]
    parts = [f'"{key}": {json.dumps(value, indent=1)}' for key, value in content.items() if key != "rows"]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "{\n" + ",\n".join([*parts, f'"rows": [\n{lines}\n]']) + "\n}\n")


def read_results(path: Path) -> dict[str, Any]:
    """Parts of a results file: `environment`, `rows`, and perhaps `scaling`.

    Raises:
        UserError: no results, or not of this version.
    """
    try:
        content = json.loads(path.read_text())
        return {**content, "environment": content["environment"], "rows": [Row(**row) for row in content["rows"]]}
    except OSError:
        raise UserError(f"{path}: cannot be read; give what benchmarks.run wrote") from None
    except ValueError:
        raise UserError(f"{path}: is not JSON") from None
    except (KeyError, TypeError):
        raise UserError(f"{path}: is not a results file of this version; measure anew") from None

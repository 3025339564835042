"""CSV files: whole or not at all, and safe to open in a spreadsheet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pspg.engine.utils.files import write_text
from pspg.engine.utils.tables import safe_cell, write_csv


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@a", "\ta", "\ra"])
def test_safe_cell(text: str) -> None:
    assert safe_cell(text) == "'" + text
    assert safe_cell("a" + text) == "a" + text


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_csv(path, ["a"], [[-1.5], [np.float32("nan")], [Path("=x")]])

    def rows() -> Any:
        yield [1]
        raise RuntimeError("out of rows")

    with pytest.raises(RuntimeError, match="out of rows"):
        write_csv(path, ["a"], rows())
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert path.read_text().split("\n") == ["a", "-1.5", '""', "'=x", ""]
    assert list(tmp_path.iterdir()) == [path]

"""The guide's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "kernels/README.md"


def test_the_example_of_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    found: dict[str, object] = {"__name__": "example"}
    exec(compile(example, str(README), "exec"), found)
    loss, gradient = map(float, re.fullmatch(r"loss (\S+), largest gradient (\S+)\n", capsys.readouterr().out).groups())
    assert 0 < loss < float("inf")
    assert 0 < gradient < float("inf")


def test_files_of_the_guide_exist() -> None:
    folder = README.parent
    for name in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (folder / name).exists(), name
    for operator in re.findall(r"^\| `(\w+)\.(?!py`)\w+` \|", README.read_text(), re.MULTILINE):
        assert (folder / operator / "op.py").exists()
        assert (folder / operator / "reference.py").exists()

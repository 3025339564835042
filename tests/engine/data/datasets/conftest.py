"""The command that prepares data sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `pspg-engine prepare DATASET` on tmp_path/in; returns stdout, or the line of the error."""

    from pspg.engine.cli import main

    def run(dataset: str, *options: str, output: str = "out") -> str:
        arguments = ["--source", str(tmp_path / "in"), "--output", str(tmp_path / output), *options]
        status = main(["prepare", dataset, *arguments])
        captured = capsys.readouterr()
        if status:
            assert status == 2
            assert captured.err.count("\n") == 1
            assert captured.err.startswith(f"pspg-engine prepare {dataset}: error: ")
            assert not (tmp_path / output).exists() or not any((tmp_path / output).iterdir())
            assert not list(tmp_path.glob(".*partial*"))
            return captured.err
        return captured.out

    return run

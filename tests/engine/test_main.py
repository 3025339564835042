"""`python -m pspg.engine` as a rank: torchrun learns of an error that nothing caught."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest


def test_torchrun_gets_the_traceback_of_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def crash() -> int:
        raise RuntimeError("a mistake of the engine")

    monkeypatch.setattr("pspg.engine.cli.main", crash)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    with pytest.raises(RuntimeError, match="a mistake of the engine"):
        runpy.run_module("pspg.engine.__main__")
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["message"] == "RuntimeError: a mistake of the engine"
    assert "in crash" in message["extraInfo"]["py_callstack"]

"""`python -m pspg.engine`: as a rank it tells torchrun of an error that nothing caught; Ctrl-C at its very start."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pspg.engine


def test_torchrun_gets_the_traceback_of_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def crash() -> int:
        raise RuntimeError("a mistake of the engine")

    monkeypatch.setattr("pspg.engine.cli.main", crash)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    with pytest.raises(RuntimeError, match="a mistake of the engine"):
        runpy.run_module("pspg.engine", run_name="__main__")
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["message"] == "RuntimeError: a mistake of the engine"
    assert "in crash" in message["extraInfo"]["py_callstack"]


def test_ctrl_c_while_the_command_line_is_imported(tmp_path: Path) -> None:
    """As `import jsonargparse` runs, before any setting is read."""
    (tmp_path / "jsonargparse.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    links = str(Path(pspg.engine.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "pspg.engine", "train"],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), links])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "pspg-engine: interrupted\n")

"""The demo as a new user runs it, and what it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.demo import how_to_call


@pytest.mark.parametrize(
    ("files", "on_path", "message"),
    [
        (["pspg-engine"], True, "pspg-engine --help"),
        (["pspg-engine"], False, ". activate && pspg-engine --help"),
        ([], False, "pip install"),
    ],
)
def test_the_demo_ends_with_how_to_call_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], on_path: bool, message: str
) -> None:
    for name in files:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path) if on_path else "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert how_to_call().startswith(message)


@pytest.mark.slow
def test_demo_keeps_its_promises(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "tools.demo", "--output", str(out)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((out / "report" / "metrics.json").read_text())["results"]

    def macro_auc(method: str, group: str) -> float:
        return results[method][group]["macro_auc"]

    templates = [name for name in results if name.startswith("template")]
    assert len(templates) == 3
    best_seen, best_unseen = (
        max(macro_auc(name, group) for name in templates) for group in ("seen", "unseen compositions")
    )
    assert macro_auc("PsPG", "seen") >= 0.90
    assert macro_auc("PsPG", "seen") >= best_seen + 0.04
    assert macro_auc("PsPG", "unseen compositions") >= 0.75
    assert macro_auc("PsPG", "unseen compositions") >= best_unseen - 0.03
    assert macro_auc("ridge probe (ceiling)", "seen") > macro_auc("PsPG", "seen")
    assert {path.name for path in (out / "report").iterdir()} == {
        "MODEL_CARD.md",
        "metrics.json",
        "per_class.csv",
        "predictions.csv",
        "report.html",
    }
    assert (out / "real_radiograph.csv").read_text().startswith("id,effusion,")
    blended = json.loads((out / "report_residual" / "metrics.json").read_text())["results"]
    results |= blended
    own = next(iter(blended))
    best_types = max(macro_auc(name, "unseen types") for name in templates)
    assert macro_auc(own, "seen") >= macro_auc("PsPG", "seen") + 0.02
    assert macro_auc(own, "unseen compositions") >= macro_auc("PsPG", "unseen compositions")
    assert macro_auc(own, "unseen types") >= best_types - 0.005
    assert "unseen compositions" in done.stdout
    assert "report.html" in done.stdout.splitlines()[-2]
    assert "pspg-engine --help" in done.stdout.splitlines()[-1]

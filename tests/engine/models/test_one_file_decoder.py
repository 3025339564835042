"""A decoder is one file: put it there, choose it by its name, train, evaluate; take the file away and it is gone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def example() -> str:
    """The decoder of the engine's guide."""
    blocks = re.findall(
        r"```python\n(# engine/models/decoders/mean\.py\n.*?)```", (ROOT / "engine/README.md").read_text(), re.S
    )
    assert len(blocks) == 1
    return blocks[0]


@pytest.mark.slow
def test_a_decoder_added_by_one_file_trains_and_is_evaluated(phantoms: Path, settings, tmp_path: Path) -> None:
    """In a copy of the sources, whose commands are those of the real ones."""
    package = tmp_path / "sources" / "pspg"
    for folder in ("engine", "kernels"):
        shutil.copytree(ROOT / folder, package / folder, ignore=shutil.ignore_patterns("__pycache__"))
    file, run = package / "engine/models/decoders/mean.py", tmp_path / "run"

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "pspg.engine", *arguments]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)

    training = [*settings("prompt"), "--model.decoder", "mean", "--output", str(run)]
    refused = command(*training)
    assert refused.returncode == 2
    assert "model.decoder" in refused.stderr
    file.write_text(example())
    done = command(*training, "--optim.epochs", "1")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "model.json").read_text())["head"]["decoder"] == "mean"
    report = ["--manifest", str(phantoms / "test.jsonl"), "--output", str(tmp_path / "report")]
    done = command("evaluate", "--checkpoint", str(run), *report, "--evaluation.bootstrap", "0", "--workers", "0")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report/metrics.json").read_text())["results"]
    file.unlink()
    gone = command("evaluate", "--checkpoint", str(run), *report)
    assert gone.returncode == 2
    assert gone.stderr.count("\n") == 1

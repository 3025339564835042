"""Reading that stands still, and memory that is not there: one line that says so, and the run ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspg.engine import cli

SLOW = """
import sys, time
from pspg.engine.data import images

read = images.read_bytes

def hanging(path):
    if path.name == "hangs.png":
        time.sleep(3600)
    return read(path)

images.read_bytes = hanging

if __name__ == "__main__":
    from pspg.engine.cli import main
    sys.exit(main(sys.argv[1:]))
"""
LIMITED = """
import resource, sys
import pspg.engine.commands.prepare, pspg.engine.commands.train
from pspg.engine.cli import main

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 2**20,) * 2)
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def data(phantoms: Path, tmp_path: Path) -> Path:
    """Twenty-four phantoms and a row of another file, which the test has to write."""
    rows = [json.loads(line) for line in (phantoms / "train.jsonl").read_text().splitlines()[:24]]
    for row in rows:
        row["filepath"], source = Path(row["filepath"]).name, phantoms / row["filepath"]
        (tmp_path / row["filepath"]).write_bytes(source.read_bytes())
    rows.insert(5, {**rows[0], "id": "other", "filepath": "hangs.png"})
    (tmp_path / "classes.txt").write_bytes((phantoms / "classes.txt").read_bytes())
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def train(settings: Callable[[str], list[str]], data: Path, **more: object) -> list[str]:
    words = settings("prompt")
    at = words.index("--data.val")
    changes = {"data.train": data / "train.jsonl", "output": data / "run", "optim.epochs": 1, **more}
    changes |= {"optim.warmup_epochs": 0, "data.mean": 0.5, "data.std": 0.25}
    return [
        *words[:at],
        *words[at + 2 :],
        *(word for key, value in changes.items() for word in (f"--{key}", str(value))),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_reading_that_stands_still_ends_the_run_within_timeout_s(
    settings: Callable[[str], list[str]], data: Path, workers: int
) -> None:
    (data / "hangs.png").write_bytes(next(data.glob("*.png")).read_bytes())
    (data / "script.py").write_text(SLOW)
    arguments = train(settings, data, **{"data.workers": workers, "timeout_s": 5})
    done = subprocess.run([sys.executable, data / "script.py", *arguments], capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2, done.stderr[-3000:]
    assert len(lines) == 1, done.stderr[-3000:]
    assert "a batch has not come for 5 s: reading its images stands still" in lines[0]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("what", ["train 0", "train 2", "check"])
def test_memory_that_is_not_there_is_one_line(settings: Callable[[str], list[str]], data: Path, what: str) -> None:
    ramp = np.add.outer(np.arange(9900), np.arange(9900)).astype(np.uint16) * 3
    Image.fromarray(ramp).save(data / "hangs.png", compress_level=1)
    arguments = ["prepare", "check", "--manifest", str(data / "train.jsonl"), "--workers", "1"]
    if what != "check":
        arguments = train(settings, data, **{"data.workers": what.split()[1]})
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "160", *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert ("1 of 25 images cannot be used" if what == "check" else "error: out of memory") in line


@pytest.mark.parametrize("message", ["can't start new thread", "Resource temporarily unavailable"])
def test_threads_that_are_not_there_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, message: str
) -> None:
    def function(config: object) -> None:
        try:
            raise RuntimeError(message)
        finally:
            raise RuntimeError("cannot join thread before it is started")

    monkeypatch.setattr("pspg.engine.commands.phantom.draw", function)
    assert cli.main(["phantom", "--output", str(tmp_path / "phantoms")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pspg-engine phantom: error: out of memory ({message});")

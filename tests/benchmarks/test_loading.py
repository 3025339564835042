"""The benchmark of the loaders: what it writes, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.loading import check_pixels, main
from pspg.engine.data.augment import Augmentation
from pspg.engine.data.dataset import ImageDataset
from pspg.engine.data.loaders.training import make_train_loader
from pspg.engine.data.manifest import Sample
from pspg.engine.data.pixels import Pixels
from pspg.engine.utils.errors import UserError

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.loading", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_wrong_pixels_are_not_timed(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)).save(tmp_path / "a.png")
    dataset = ImageDataset(
        [Sample("a", tmp_path / "a.png")],
        Pixels(size=32, resize="stretch", mean=0.5, std=0.2),
        augmentation=Augmentation(flip=0.5),
    )
    batch = next(make_train_loader(dataset, batch_size=1).batches(0))
    check_pixels(dataset, batch)
    batch.pixels = batch.pixels.flip(-1)
    with pytest.raises(UserError, match="nothing is timed"):
        check_pixels(dataset, batch)


@pytest.mark.slow
def test_every_source_and_loader(tmp_path: Path) -> None:
    small = ["--films", 4, "--size", 64, "--image_size", 32, "--batch", 4, "--batches", 3, "--repeat", 1]
    done = run(*small, "--workers", 0, "--step_ms", 1e9, "--json", tmp_path / "new" / "out.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("keeps up") == 6
    rows = json.loads((tmp_path / "new" / "out.json").read_text())
    assert [(row["source"], row["loader"]) for row in rows] == [
        (source, loader) for source in ("jpeg", "png", "cache") for loader in ("torch", "dali")
    ]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(4 / row["batch_seconds"])
        assert {"machine", "versions", "commit", "start_seconds", "keeps_up"} <= row.keys()
        assert any(name.startswith("nvidia-dali") for name in row["versions"])


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    cases = [(["--batches", "1"], "--batches: must be at least 2"), (["--workers", "-1"], "must not be negative")]
    cases += [(["--json", str(tmp_path / "file" / "out.json")], "which is a file")]
    if not torch.cuda.is_available():
        cases += [(["--device", "cuda"], "--device cuda: torch sees no GPU")]
    for arguments, reason in cases:
        monkeypatch.setattr(sys, "argv", ["benchmarks.loading", *arguments])
        try:
            status: object = main()
        except SystemExit as error:  # argparse's own
            status = error.code
        assert status == 2
        assert reason in capsys.readouterr().err

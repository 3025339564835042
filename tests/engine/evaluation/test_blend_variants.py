"""The table of blends that the engine does not have: its rows of today's formula are the engine's scores."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

import pspg.engine as pspg
from tools.blend_variants import blend, main, scores


@pytest.fixture
def manifest(image_folder: Path, names: list[str]) -> Path:
    every, images = [*names, "left out", "another"], sorted(image_folder.rglob("*.png"))
    (image_folder / "classes.txt").write_text("".join(f"{name}\n" for name in every))
    labels = [[(k + c) % 2 for c in range(len(every))] for k in range(len(images))]
    rows = [
        {"id": str(k), "filepath": str(path.relative_to(image_folder)), "labels": labels[k]}
        for k, path in enumerate(images)
    ]
    (image_folder / "val.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return image_folder / "val.jsonl"


def test_default_formula_is_the_engines(
    model_folder: Callable[..., Path], manifest: Path, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = model_folder()
    (run / "config.yaml").write_text(yaml.safe_dump({"seed": 7}))
    found = scores(run, str(manifest), [*names, "left out", "another"])
    assert found.seed == 7
    assert found.new.min() > 0
    model = pspg.load_model(run, device="cpu", blend="novelty", blend_weight=3.0)
    model.set_classes(["left out", "another"])
    images = sorted(manifest.parent.rglob("*.png"))
    np.testing.assert_allclose(blend(found, a=3, power=1, own=False), model.score(images).logits, rtol=1e-6, atol=1e-6)
    assert np.abs(blend(found, a=3, power=1, own=True) - blend(found, a=3, power=1, own=False)).max() > 1e-3
    assert main([str(run), "--manifest", str(manifest), "--classes", str(manifest.parent / "classes.txt")]) == 0
    assert "| ν², σ by class | 16 |" in capsys.readouterr().out


def test_nothing_left_out_is_refused(
    model_folder: Callable[..., Path], manifest: Path, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    classes = manifest.parent / "seen.txt"
    classes.write_text("".join(f"{name}\n" for name in names))
    assert main([str(model_folder()), "--manifest", str(manifest), "--classes", str(classes)]) == 2
    assert "not a run that was trained without some" in capsys.readouterr().err

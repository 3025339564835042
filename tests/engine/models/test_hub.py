"""Folders in the Hugging Face Hub's layout as a backbone and as a model; names on the Hub without a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pspg.engine as pspg
from pspg.engine.checkpoints.model_folder import load_clip_folder
from pspg.engine.cli import main
from pspg.engine.models import hub
from pspg.engine.models.clip import build_clip
from pspg.engine.utils.errors import UserError
from tests.engine.conftest import NAMES, PHANTOM_CLIP

Arguments = Callable[[str], list[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A CLIP as `open_clip.push_to_hf_hub` writes it."""
    found = tmp_path / "clip"
    found.mkdir()
    torch.manual_seed(5)
    clip = build_clip(PHANTOM_CLIP)
    config = {"model_cfg": PHANTOM_CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (found / "open_clip_config.json").write_text(json.dumps(config))
    save_file(dict(clip.state_dict()), found / "open_clip_model.safetensors")
    return found


@pytest.mark.parametrize("named", [False, True])
def test_a_folder_brings_architecture_and_weights(
    folder: Path, settings: Arguments, tmp_path: Path, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        assert not any(pattern.endswith(".py") or pattern == "*" for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    run = tmp_path / "run"
    pretrained = "hf-hub:owner/name@v1" if named else str(folder)
    words = [*settings("prompt"), "--model.backbone", "RN50", "--model.pretrained", pretrained, "--output", str(run)]
    assert main([*words, "--optim.epochs", "1"]) == 0
    assert asked == ([("owner/name", "v1")] if named else [])
    clip, _ = load_clip_folder(run)
    torch.manual_seed(5)
    expected = build_clip(PHANTOM_CLIP).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in clip.state_dict().items())


def test_what_cannot_be_fetched_is_one_line(
    folder: Path, settings: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    def fetch(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host\nand more")

    words = [*settings("prompt"), "--output", str(tmp_path / "run")]
    assert main([*words, "--model.pretrained", "hf-hub:one/two/three"]) == 2
    assert "hf-hub:one/two/three is no name on the Hugging Face Hub; write hf-hub:OWNER/NAME" in capsys.readouterr().err
    monkeypatch.setattr(hub, "snapshot_download", fetch)
    for command in (
        [*words, "--model.pretrained", "hf-hub:owner/name"],
        ["predict", "--checkpoint", "hf-hub:owner/name", "--input", str(folder), "--output", str(tmp_path / "p.csv")],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "cannot fetch hf-hub:owner/name from the Hugging Face Hub (no route to host)" in error
    with pytest.raises(UserError, match="cannot fetch hf-hub:owner/name"):
        pspg.load_model("hf-hub:owner/name")
    (folder / "open_clip_model.safetensors").unlink()
    assert main([*words, "--model.pretrained", str(folder)]) == 2
    assert "has open_clip_config.json and none of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_every_command_takes_a_model_by_its_name_on_the_hub(
    model_folder: Callable[..., Path],
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calibrate writes to this machine's copy, beside a link of the Hub's cache and not through it."""
    model, blob = model_folder(vit=True), tmp_path / "blob"
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(model))
    lines = [
        {"id": str(number), "filepath": str(path.relative_to(image_folder)), "labels": [number % 2] * 4}
        for number, path in enumerate(sorted(image_folder.rglob("*.png")))
    ]
    manifest = image_folder / "val.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    (image_folder / "classes.txt").write_text("\n".join(NAMES))
    name, labelled = "hf-hub:owner/name", ["--manifest", str(manifest), "--workers", "0"]
    calibrate = ["calibrate", "--checkpoint", name, *labelled, "--min_positives", "2"]
    assert main(calibrate) == 0
    (model / "calibration.json").rename(blob)
    (model / "calibration.json").symlink_to(blob)
    before = blob.read_bytes()
    assert main([*calibrate, "--method", "temperature"]) == 0
    assert "this machine's copy of hf-hub:owner/name" in capsys.readouterr().err
    assert not (model / "calibration.json").is_symlink()
    assert blob.read_bytes() == before != (model / "calibration.json").read_bytes()
    for layout in ("pspg-engine", "published", "classifier"):
        output = str(tmp_path / layout)
        assert main(["export-checkpoint", "--checkpoint", name, "--output", output, "--layout", layout]) == 0
        assert f"exported hf-hub:owner/name: {output}" in capsys.readouterr().err
    report = ["evaluate", "--checkpoint", name, "--compare", f"{{other: {name}}}", "--output", str(tmp_path / "report")]
    assert main([*report, *labelled, "--evaluation.bootstrap", "0"]) == 0


def test_a_head_on_the_hub_starts_a_training(
    settings: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*settings("prompt"), "--output", str(first), "--optim.epochs", "1"]) == 0
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(first))
    words = [*settings("prompt"), "--output", str(second), "--optim.epochs", "1"]
    assert main([*words, "--model.pretrained_head", "hf-hub:owner/name"]) == 0

"""Model folders with random weights, and their evaluation. What is slow to import is imported by its fixture."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def models(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders with random weights: `clip`, and `pspg` on the same CLIP."""
    import torch

    from pspg.engine.checkpoints.model_folder import describe, write_model
    from pspg.engine.config import ModelConfig
    from pspg.engine.data.manifest import load_label_names
    from pspg.engine.data.pixels import Pixels
    from pspg.engine.models.clip import load_clip
    from pspg.engine.models.pspg import PsPG

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    clip = load_clip(str(phantoms / "clip.json"), None, quick_gelu=True)
    pixels = Pixels(size=64, resize="stretch", mean=0.4, std=0.2)
    names = load_label_names(phantoms / "classes.txt")
    head = ModelConfig(prompt_length=3, hidden_size=16, decoder_heads=2)
    model = PsPG(clip, head, names)
    description = describe("pspg", clip, pixels, head=head, class_names=names, training="phantoms")
    towers = dict(clip.state_dict())
    write_model(folder / "pspg", description, {"clip": towers, "model": dict(model.head.state_dict())})
    write_model(folder / "clip", describe("clip", clip, pixels, training="phantoms"), {"model": towers})
    return folder


@pytest.fixture
def evaluate(phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Function (arguments, …) → exit status, of an evaluation of the test split to tmp_path / name, without figures."""
    from pspg.engine.cli import main
    from pspg.engine.evaluation.report import plots

    for figure in ("curves", "reliability_diagram", "cooccurrence"):
        monkeypatch.setattr(plots, figure, lambda *arguments, **options: {})

    def run(*arguments: object, name: str = "report") -> int:
        paths = ["--manifest", phantoms / "test.jsonl", "--output", tmp_path / name]
        more = [
            "--overwrite",
            "true",
            "--workers",
            0,
            "--device",
            "cpu",
            "--evaluation.bootstrap",
            0,
            "--evaluation.batch_size",
            16,
        ]
        return main(["evaluate", *map(str, [*paths, *more, *arguments])])

    return run

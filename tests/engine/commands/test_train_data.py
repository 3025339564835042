"""A run's view of its data: the view of the images that each part sees, the bank, and what resuming compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pspg.engine.checkpoints.run import load_tensors
from pspg.engine.commands.train import make_trainer, train
from pspg.engine.config import DataConfig, EvaluationConfig, ModelConfig
from pspg.engine.data.augment import Augmentation
from pspg.engine.data.dataset import ImageDataset
from pspg.engine.data.manifest import Manifest, load_manifest
from pspg.engine.distributed.world import start
from pspg.engine.training import contrastive, prompt_learning, setup
from pspg.engine.training.config import OptimConfig, TrainConfig
from pspg.engine.training.fingerprint import data_digest
from pspg.engine.utils.errors import UserError
from tests.engine.conftest import tiny_config

N = 8


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Eight images of noise with two labels each, classes.txt and clip.json."""
    noise = np.random.default_rng(0)
    lines = []
    for number in range(N):
        Image.fromarray(noise.integers(0, 256, (32, 32), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        line = {"id": str(number), "filepath": f"{number}.png", "text": "edema", "labels": [number % 2, number // 4]}
        lines.append(json.dumps(line) + "\n")
    (tmp_path / "classes.txt").write_text("edema\nmass\n")
    (tmp_path / "clip.json").write_text(json.dumps(tiny_config()))
    (tmp_path / "all.jsonl").write_text("".join(lines))
    return tmp_path / "all.jsonl"


def config(manifest: Path, output: str, task: Any = "prompt", seed: int = 0) -> TrainConfig:
    return TrainConfig(
        task=task,
        output=str(manifest.parent / output),
        model=ModelConfig(
            backbone=str(manifest.parent / "clip.json"),
            pretrained="random",
            prompt_length=2,
            hidden_size=8,
            decoder_heads=2,
        ),
        data=DataConfig(train=str(manifest), val=str(manifest), image_size=32, flip=1.0, workers=0, mean=0.5, std=0.3),
        optim=OptimConfig(epochs=1, warmup_epochs=0),
        evaluation=EvaluationConfig(batch_size=4, bank_size=3),
        batch_size=4,
        device="cpu",
        seed=seed,
    )


@pytest.mark.parametrize("task", ["contrastive", "prompt"])
def test_only_training_images_are_augmented_and_flipped(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    seen: dict[str, list[ImageDataset]] = {"train": [], "eval": []}
    phase = contrastive if task == "contrastive" else prompt_learning
    for kind, module, name in (("train", setup, "make_train_loader"), ("eval", phase, "make_eval_loader")):
        make = getattr(module, name)

        def record(dataset: ImageDataset, *, _make: Any = make, _kind: str = kind, **options: Any) -> Any:
            seen[_kind].append(dataset)
            return _make(dataset, **options)

        monkeypatch.setattr(module, name, record)
    make_trainer(config(manifest, "run", task, seed=6), start("cpu"))
    assert [view.augmentation for view in seen["train"]] == [Augmentation(augment=True, flip=1.0, seed=6)]
    # Validation, and in phase 2 the context bank before it.
    assert [bool(view.augmentation) for view in seen["eval"]] == [False] * (2 if task == "prompt" else 1)


def test_the_seed_draws_the_images_of_the_bank(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = []
    cache = prompt_learning.cache_features

    def record(model: Any, loader: Any, *rest: Any, **options: Any) -> Any:
        found = cache(model, loader, *rest, **options)
        drawn.append(found.ids)
        return found

    monkeypatch.setattr(prompt_learning, "cache_features", record)
    for seed in range(4):
        make_trainer(config(manifest, f"run{seed}", seed=seed), start("cpu"))
        assert load_tensors(manifest.parent / f"run{seed}" / "bank.safetensors")["bank"].shape == (3, 24)
    assert all(len(set(ids)) == 3 for ids in drawn)
    assert len({tuple(ids) for ids in drawn}) > 1


def test_the_fingerprint_tells_data_apart(manifest: Path) -> None:
    data = load_manifest(manifest, need="labels")
    labels = np.array([sample.labels for sample in data.samples], dtype=np.float32)
    other = labels.copy()
    other[3, 1] = 1 - other[3, 1]
    turned = Manifest(data.path, data.samples[::-1], data.label_names)
    texts = manifest.with_name("texts.jsonl")
    texts.write_text(manifest.read_text().replace('"text": "edema"', '"text": "mass"', 1))
    found = [
        data_digest(data, labels),
        data_digest(data, other),
        data_digest(turned, labels),
        data_digest(data),
        data_digest(load_manifest(texts, need="text")),
    ]
    assert len(set(found)) == len(found)
    assert data_digest(load_manifest(manifest, need="labels"), labels) == found[0]
    # Phase 2 does not read texts.
    assert data_digest(load_manifest(texts, need="labels"), labels) == found[0]


def test_validation_sees_what_the_files_hold(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels of the first validation batch: those of the files, in the order of the manifest."""
    trainer = make_trainer(config(manifest, "run", "contrastive"), start("cpu"))
    pixels: list[torch.Tensor] = []
    arguments = trainer.task._arguments
    monkeypatch.setattr(trainer.task, "_arguments", lambda batch: (pixels.append(batch.pixels), arguments(batch))[1])
    trainer.task.validate(trainer.task.module)
    files = [torch.from_numpy(np.array(Image.open(manifest.parent / f"{number}.png"))) for number in range(N)]
    assert torch.equal(torch.cat(pixels), torch.stack(files))


def test_a_random_frozen_backbone_is_refused_unless_it_is_meant(manifest: Path) -> None:
    asked = config(manifest, "run")
    asked.model.pretrained = None
    with pytest.raises(UserError, match=r"^model\.pretrained: phase 2 freezes the backbone, .* or write random if you"):
        train(asked)
    assert not Path(asked.output).exists()

"""A residual on text features: zero where nothing was trained, its own learning rate, one score everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pspg.engine.checkpoints.classifier import load_classifier
from pspg.engine.checkpoints.model_folder import load_model
from pspg.engine.cli import main
from pspg.engine.config import ModelConfig
from pspg.engine.models.pspg import PsPG, probabilities
from pspg.engine.models.residual import ClassResidual
from pspg.engine.training.config import OptimConfig
from pspg.engine.training.trainer import parameter_groups

Make = Callable[..., Path]
SMALL = {"prompt_length": 3, "hidden_size": 8, "decoder_heads": 2, "residual": "class"}
CLASSES = ["a mass", "edema", "gallstone", "cardiomegaly"]  # of the four training classes, edema is the third


@pytest.fixture
def trained(model_folder: Make) -> Path:
    """A model folder whose residual is not zero."""
    folder = model_folder(vit=True, residual="class")
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    tensors["residual.offsets"] = 0.3 * torch.randn(2, 4, 24, generator=generator)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_formula_and_its_gradient() -> None:
    residual = ClassResidual(2, 3, 5).double()
    with torch.no_grad():
        residual.offsets.normal_()
    features = torch.nn.functional.normalize(torch.randn(2, 4, 5, dtype=torch.float64), dim=-1)
    rows = torch.tensor([2, -1, 0, -1])
    found = residual(features, rows)
    for side in range(2):
        for c, row in enumerate(rows.tolist()):
            moved = features[side, c] if row < 0 else features[side, c] + residual.offsets[side, row]
            torch.testing.assert_close(found[side, c], moved / moved.norm() if row >= 0 else features[side, c])
    assert torch.equal(found[:, [1, 3]], features[:, [1, 3]])
    found.sum().backward()
    assert residual.offsets.grad is not None
    assert residual.offsets.grad[:, 1].abs().max() == 0
    assert torch.autograd.gradcheck(lambda x: residual(x, rows), features.requires_grad_())


def test_only_training_classes_move(trained: Path) -> None:
    model = load_model(trained).model
    class_set = model.class_set_of(CLASSES)
    assert class_set.rows.tolist() == [-1, 2, -1, 0]
    assert model.class_set_of(["Edema"]).rows.tolist() == [2]  # the tokenizer ignores case
    context = torch.randn(6, 24)
    with torch.no_grad():
        moved = model.head.text_features(context, class_set, model.tower)
        model.head.residual.offsets.zero_()
        plain = model.head.text_features(context, class_set, model.tower)
    for side in ("positive", "negative"):
        assert torch.equal(getattr(moved, side)[[0, 2]], getattr(plain, side)[[0, 2]])
        assert (getattr(moved, side) - getattr(plain, side))[[1, 3]].abs().amax(dim=1).min() > 0.01


def test_it_starts_at_zero_and_trains(make_clip: Callable[..., Any], names: list[str]) -> None:
    torch.manual_seed(0)
    model = PsPG(make_clip(), ModelConfig(**SMALL), names).train()
    torch.manual_seed(0)
    plain = PsPG(make_clip(), ModelConfig(**{**SMALL, "residual": "none"}), names)
    assert model.head.state_dict().keys() - plain.head.state_dict().keys() == {"residual.offsets"}
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model.eval()(images).logits, plain.eval()(images).logits, rtol=1e-9, atol=1e-9)
    model(images).logits[:, 0].sum().backward()
    gradient = model.head.residual.offsets.grad
    assert gradient[0].abs().amax(dim=1).min() > 0
    assert gradient[1].abs().max() == 0


def test_positive_prompts_have_one_side(make_clip: Callable[..., Any], names: list[str]) -> None:
    model = PsPG(make_clip(), ModelConfig(**SMALL, prompts="positive"), names)
    assert model.head.residual.offsets.shape == (1, 4, 24)
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).logits[:, 1].abs().max() == 0


def test_its_own_learning_rate_and_decay(make_clip: Callable[..., Any], names: list[str]) -> None:
    head = PsPG(make_clip(), ModelConfig(**SMALL), names).head
    groups = parameter_groups(head, OptimConfig(lr=1e-3, residual_lr=1e-2, residual_decay=0.5))
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.05), (1e-3, 0.0), (1e-2, 0.5)]
    assert [tuple(p.shape) for p in groups[2]["params"]] == [(2, 4, 24)]
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in head.parameters())
    plain = parameter_groups(head, OptimConfig(lr=1e-3))[2]
    assert (plain["lr"], plain["weight_decay"]) == (1e-3, 0.05)


def test_a_classifier_has_it(trained: Path, tmp_path: Path) -> None:
    images = torch.randn(4, 3, 32, 32)
    for number, blend in enumerate(("none", "novelty")):
        output = str(tmp_path / str(number))
        command = ["export-checkpoint", "--checkpoint", str(trained), "--output", output, "--layout", "classifier"]
        assert main([*command, "--class_names", json.dumps(CLASSES), "--blend", blend]) == 0
        loaded = load_model(trained)
        loaded.set_classes(CLASSES)
        with torch.no_grad():
            expected = probabilities(loaded.model(images, context=loaded.bank).logits)
        found = load_classifier(output)(images)
        columns = [0, 1, 2, 3] if blend == "none" else [1, 3]
        torch.testing.assert_close(found[:, columns], expected[:, columns], rtol=0, atol=1e-6)


def test_the_published_layout_has_no_place_for_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export-checkpoint", "--checkpoint", str(trained), "--output", str(tmp_path / "x")]
    assert main([*command, "--layout", "published"]) == 2
    assert "no model.residual class; use layout pspg-engine" in capsys.readouterr().err
    assert main(command) == 0
    assert torch.equal(
        load_model(tmp_path / "x").model.head.residual.offsets, load_model(trained).model.head.residual.offsets
    )


@pytest.mark.parametrize("kept", [False, True])
def test_other_classes_start_from_a_residual_of_zero(
    phantoms: Path, settings: Callable[[str], list[str]], tmp_path: Path, kept: bool
) -> None:
    """The paper's cross-dataset training, and training on."""
    every = (phantoms / "classes.txt").read_text().splitlines()
    base = [*settings("prompt"), "--model.residual", "class", "--optim.epochs", "1", "--optim.warmup_epochs", "0"]
    first = [*base, "--optim.residual_lr", "1e-2", "--loss.pair", "none", "--output", str(tmp_path / "a")]
    assert main([*first, "--data.class_names", json.dumps(every[:6])]) == 0
    before = load_model(tmp_path / "a").model.head.residual.offsets
    assert before.abs().max() > 1e-3
    again = [*base, "--optim.residual_lr", "1e-9", "--loss.pair", "none", "--output", str(tmp_path / "b")]
    names = every[:6] if kept else every[6:9]
    start = ["--model.pretrained_head", str(tmp_path / "a"), "--optim.residual_decay", "0"]
    assert main([*again, *start, "--data.class_names", json.dumps(names)]) == 0
    after = load_model(tmp_path / "b").model.head.residual.offsets
    torch.testing.assert_close(after, before if kept else torch.zeros(2, 3, 32), rtol=0, atol=1e-6)

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
from pspg.engine.models.residual import ClassResidual, related_mixing
from pspg.engine.training.config import OptimConfig
from pspg.engine.training.optimizer import parameter_groups
from tests.engine.seal import seal

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
    seal(folder)
    return folder


def test_the_formula_and_its_gradient() -> None:
    residual = ClassResidual(2, 3, 5).double()
    with torch.no_grad():
        residual.offsets.normal_()
    features = torch.nn.functional.normalize(torch.randn(2, 4, 5, dtype=torch.float64), dim=-1)
    mixing = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 0], [0.5, 0, -2]], dtype=torch.float64)
    found = residual(features, mixing)
    for side in range(2):
        for c, row in enumerate(mixing):
            moved = features[side, c] + sum(m * residual.offsets[side, t] for t, m in enumerate(row))
            torch.testing.assert_close(found[side, c], moved / moved.norm())
    assert torch.equal(found[:, 1], features[:, 1])
    found.sum().backward()
    assert residual.offsets.grad is not None
    assert residual.offsets.grad[:, 1].abs().max() == 0
    assert torch.autograd.gradcheck(lambda x: residual(x, mixing), features.requires_grad_())


def test_classes_borrow_from_those_with_like_names() -> None:
    """Kernel ridge regression, against its normal equations; training classes keep their own."""
    training, new = torch.randn(5, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    new[0] = training[3] + 0.3 * new[0]
    features, rows = torch.cat([new, training[[4]]]), torch.tensor([-1, -1, 4])
    found = related_mixing(rows, features, training)
    assert torch.equal(found[2], torch.eye(5)[4])
    assert found[0].argmax() == 3
    unit = torch.nn.functional.normalize(training, dim=-1)
    mean = unit.mean(0)
    known = torch.nn.functional.normalize(unit - mean, dim=-1)
    own = torch.nn.functional.normalize(torch.nn.functional.normalize(new, dim=-1) - mean, dim=-1)
    among, across = (known @ known.T).clamp(min=0) ** 3, (own @ known.T).clamp(min=0) ** 3
    solved = found[:2].double() @ (among + 0.1 * torch.eye(5))
    torch.testing.assert_close(solved, across, rtol=1e-4, atol=1e-5)


def test_related_classes_do_not_depend_on_the_list(trained: Path) -> None:
    description = json.loads((trained / "model.json").read_text())
    description["head"]["residual"] = "related"
    (trained / "model.json").write_text(json.dumps(description))
    model = load_model(trained).model
    together = model.class_set_of(CLASSES).mixing
    assert together[0].abs().max() > 0
    torch.testing.assert_close(model.class_set_of([CLASSES[0]]).mixing[0], together[0])
    assert torch.equal(model.class_set_of(model.training_names).mixing, torch.eye(4))


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


@pytest.mark.parametrize("kind", ["class", "related"])
def test_a_classifier_has_it(trained: Path, tmp_path: Path, kind: str) -> None:
    images = torch.randn(4, 3, 32, 32)
    text = (trained / "model.json").read_text()
    (trained / "model.json").write_text(text.replace('"residual": "class"', f'"residual": "{kind}"'))
    for number, blend in enumerate(("none", "novelty")):
        output = str(tmp_path / str(number))
        command = ["export-checkpoint", "--checkpoint", str(trained), "--output", output, "--layout", "classifier"]
        assert main([*command, "--class_names", json.dumps(CLASSES), "--blend", blend]) == 0
        loaded = load_model(trained)
        assert loaded.model.config.residual == kind
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


def test_it_trains_alone_on_finished_prompts(
    phantoms: Path, settings: Callable[[str], list[str]], tmp_path: Path
) -> None:
    """Everything else keeps its bits, other classes their scores; resuming and killing are the trainer's as ever."""
    every = (phantoms / "classes.txt").read_text().splitlines()
    base = [*settings("prompt"), "--loss.pair", "none", "--data.class_names", json.dumps(every[:6])]
    assert main([*base, "--output", str(tmp_path / "prompts")]) == 0
    start = ["--model.pretrained", str(tmp_path / "prompts"), "--model.pretrained_head", str(tmp_path / "prompts")]
    after = [*base, *start, "--task", "residual", "--model.residual", "class", "--optim.lr", "1e-2"]
    assert main([*after, "--optim.ema_decay", "0.5", "--output", str(tmp_path / "residual")]) == 0
    old, new = (load_model(tmp_path / run) for run in ("prompts", "residual"))
    assert new.model.head.residual.offsets.abs().amax(dim=-1).min() > 1e-3
    for name, tensor in old.model.head.state_dict().items():
        assert torch.equal(new.model.head.state_dict()[name], tensor), name
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        for names, same in ((every[6:10], True), (every[:6], False)):
            found = []
            for loaded in (old, new):
                loaded.set_classes(names)
                found.append(loaded.model(images, context=old.bank).logits)
            assert torch.equal(*found) == same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss.pair", "none", "--model.pretrained_head", "x"], "model.residual: task residual trains it; set class"),
        (["--loss.pair", "none", "--model.residual", "class"], "model.pretrained_head: task residual needs the folder"),
        (["--model.pretrained_head", "x", "--model.residual", "class"], "loss.pair: task residual has no pair prompts"),
    ],
)
def test_settings_that_train_no_residual_are_one_line(
    settings: Callable[[str], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert main([*settings("residual"), *arguments, "--output", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


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

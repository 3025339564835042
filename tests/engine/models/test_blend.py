"""Blends of learned prompts with templates: the formula, what stays as it is, and one score wherever it is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pspg.engine.checkpoints.classifier import freeze_classifier, load_classifier
from pspg.engine.checkpoints.integrity import sha256_of
from pspg.engine.checkpoints.model_folder import load_model
from pspg.engine.cli import main
from pspg.engine.commands.evaluate import evaluate_model
from pspg.engine.commands.predict import predict
from pspg.engine.commands.settings import PredictConfig
from pspg.engine.config import EvaluationConfig
from pspg.engine.evaluation.config import EvaluateConfig
from pspg.engine.models.blend import blended
from pspg.engine.models.clip import ImageFeatures
from pspg.engine.models.novelty import novelty
from pspg.engine.models.templates import PAIRED, template_probabilities, template_texts
from pspg.engine.utils.errors import UserError
from tests.engine.seal import seal

Make = Callable[..., Path]
NEW = ["gallstone", "edema", "a mass"]


@pytest.fixture
def folder(model_folder: Make) -> Callable[..., Path]:
    return partial(model_folder, vit=True)


def odds(probabilities: torch.Tensor) -> torch.Tensor:
    return torch.logit(probabilities.double())


def images() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def test_novelty_is_one_minus_the_largest_centred_cosine() -> None:
    training, new = torch.randn(4, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    unit = [row / row.norm() for row in training]
    mean = sum(unit) / 4
    for name, found in zip(new, novelty(new, training), strict=True):
        own = name / name.norm() - mean
        cosines = [own @ (row - mean) / own.norm() / (row - mean).norm() for row in unit]
        assert float(found) == pytest.approx(1 - float(max(cosines)), abs=1e-5)
    assert (novelty(3 * training[[2, 0]], training) == 0).all()
    assert novelty(torch.stack([training[0], new[0]]), training[:1]).tolist() == [0, 1]


@pytest.mark.parametrize("kind", ["novelty", "fixed"])
def test_the_formula(folder: Make, kind: Any) -> None:
    """z = z_learned + w σ_learned/σ_template z_template, from probabilities alone."""
    loaded = load_model(folder())
    model, bank = loaded.model, loaded.bank_features
    assert bank is not None
    class_set = model.class_set_of(NEW)

    def learned(features: ImageFeatures, names: Any) -> torch.Tensor:
        logits = model.head(features, names, model.tower, context=bank.global_).logits
        return logits[:, 0] - logits[:, 1]

    def template(features: ImageFeatures, names: list[str]) -> torch.Tensor:
        texts = template_texts(model.clip, names, torch.device("cpu"))
        return odds(torch.from_numpy(template_probabilities(model.clip, features.global_, texts)[PAIRED]))

    with torch.no_grad():
        sigma = [
            z.var(dim=0, correction=0).mean().sqrt()
            for z in (learned(bank, model.class_set), template(bank, model.class_set.names))
        ]
        features = model.image_features(images())
        weight = 2.5 * (novelty(class_set.class_features, model.class_set.class_features) if kind == "novelty" else 1)
        expected = learned(features, class_set) + weight * sigma[0] / sigma[1] * template(features, NEW)
        logits = model.head(features, class_set, model.tower, context=bank.global_).logits
        found = blended(logits, features.tokens, loaded.blend(class_set, kind, 2.5))
    torch.testing.assert_close((found[:, 0] - found[:, 1]).double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_training_classes_stay_as_they_are(folder: Make) -> None:
    loaded = load_model(folder())
    assert loaded.blend(loaded.model.class_set, "novelty") is None
    found = loaded.blend(loaded.model.class_set_of(NEW), "novelty")
    assert found is not None
    assert found[1].abs().max() == 0  # edema
    assert found[[0, 2]].abs().min() > 0
    assert loaded.blend(loaded.model.class_set_of(NEW), "none") is None
    assert loaded.blend(loaded.model.class_set, "fixed") is not None


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"prompts": "positive"},
        {"fusion": "regions", "decoder": "context"},
        {"residual": "class"},
        {"residual": "related"},
    ],
)
def test_evaluate_predict_and_the_classifier_agree(folder: Make, tmp_path: Path, head: dict[str, Any]) -> None:
    source = folder(**head)
    if "residual" in head:
        tensors = load_file(source / "model.safetensors")
        offsets = torch.randn(tensors["residual.offsets"].shape, generator=torch.Generator().manual_seed(5))
        save_file({**tensors, "residual.offsets": 0.3 * offsets}, source / "model.safetensors")
        seal(source)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    noise = np.random.default_rng(0)
    rows = []
    for number in range(4):
        Image.fromarray(noise.integers(0, 256, (40, 40), dtype=np.uint8)).save(pictures / f"{number}.png")
        labels = [number % 2, number // 2, 1 - number % 2]
        rows.append(json.dumps({"id": f"{number}.png", "filepath": f"{number}.png", "labels": labels}))
    (pictures / "test.jsonl").write_text("\n".join(rows))
    (pictures / "classes.txt").write_text("\n".join(NEW))
    settings = EvaluationConfig(context="bank", blend="novelty", blend_weight=3.0, bootstrap=0)
    evaluate_model(
        EvaluateConfig(
            checkpoint=str(source),
            manifest=str(pictures / "test.jsonl"),
            output=str(tmp_path / "report"),
            evaluation=settings,
            baselines=False,
            workers=0,
        )
    )
    table = np.genfromtxt(tmp_path / "report/predictions.csv", delimiter=",", skip_header=1)[:, 1:]
    config = PredictConfig(
        checkpoint=str(source), input=str(pictures / "test.jsonl"), output=str(tmp_path / "p.csv"), class_names=NEW,
        blend_weight=3.0, workers=0, overwrite=True,
    )  # fmt: skip
    predicted = predict(config).probabilities
    np.testing.assert_allclose(predicted, table, rtol=0, atol=1e-6)
    command = ["export-checkpoint", "--checkpoint", str(source), "--output", str(tmp_path / "shipped")]
    frozen = ["--layout", "classifier", "--class_names", json.dumps(NEW), "--blend_weight", "3"]
    assert main([*command, *frozen]) == 0
    classifier = load_classifier(tmp_path / "shipped")
    pixels = torch.stack([classifier.read(pictures / f"{number}.png") for number in range(4)])
    np.testing.assert_allclose(classifier(pixels).numpy(), table, rtol=0, atol=1e-6)
    other = predict(replace(config, blend="none", blend_weight=None)).probabilities
    assert np.abs(other - predicted)[:, [0, 2]].max() > 1e-4
    np.testing.assert_array_equal(other[:, 1], predicted[:, 1])
    classifier.set_classes(["a mass", "edema"])
    np.testing.assert_allclose(classifier(pixels).numpy(), table[:, [2, 1]], rtol=0, atol=1e-6)


def test_the_blend_is_as_large_for_a_batch_as_for_its_images(folder: Make) -> None:
    loaded = load_model(folder())
    loaded.set_classes(NEW)
    classifier = freeze_classifier(loaded, blend="novelty")
    alone = torch.cat([classifier(image[None]) for image in images()])
    torch.testing.assert_close(classifier(images()), alone, rtol=0, atol=1e-6)


def test_models_without_bank_features_score_their_own_classes(model_folder: Make, image_folder: Path) -> None:
    """Models of earlier versions, and imported ones."""
    source = model_folder(vit=True, tokens=False)
    output = image_folder / "p.csv"
    config = PredictConfig(
        checkpoint=str(source), input=str(image_folder), output=str(output), workers=0, overwrite=True
    )
    assert len(predict(config).ids) == 5
    with pytest.raises(UserError, match="set blend to none, or train again"):
        predict(replace(config, class_names=NEW))
    assert len(predict(replace(config, class_names=NEW, blend="none")).ids) == 5


def test_a_bank_of_other_images_is_refused(folder: Make) -> None:
    source = folder()
    tensors = load_file(source / "bank.safetensors")
    save_file({**tensors, "tokens": tensors["tokens"][:3].clone()}, source / "bank.safetensors")
    description = json.loads((source / "model.json").read_text())
    description["files"]["bank.safetensors"] = sha256_of(source / "bank.safetensors")
    (source / "model.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"bank\.safetensors: its tokens are not those of its bank"):
        load_model(source)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blend", "fixed"], "blend: only layout classifier freezes a blend"),
        (["--layout", "published", "--blend_weight", "2"], "blend_weight: only layout classifier"),
        (["--layout", "classifier", "--blend", "old"], "blend"),
    ],
)
def test_exports_that_freeze_no_blend_are_one_line(
    folder: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    command = ["export-checkpoint", "--checkpoint", str(folder()), "--output", str(tmp_path / "out"), *arguments]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_classifier_keeps_its_blend(folder: Make, image_folder: Path, tmp_path: Path) -> None:
    command = ["export-checkpoint", "--checkpoint", str(folder()), "--output", str(tmp_path / "out")]
    assert main([*command, "--layout", "classifier", "--class_names", json.dumps(NEW)]) == 0
    assert json.loads((tmp_path / "out/open_clip_config.json").read_text())["blend"] == "novelty"
    config = PredictConfig(checkpoint=str(tmp_path / "out"), input=str(image_folder), output=str(tmp_path / "p.csv"))
    with pytest.raises(UserError, match=r"blend: .* whose blend is frozen"):
        predict(replace(config, blend="none"))

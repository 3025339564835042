"""`load_model` in Python: the same scores as the commands, from images of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pspg.engine as pspg
from pspg.engine.cli import main

Make = Callable[..., Path]
NEW = ["gallstone", "edema", "a mass"]


@pytest.fixture
def films(image_folder: Path) -> list[Path]:
    return sorted(image_folder.rglob("*.png"))


def test_every_kind_of_image_scores_as_predict_does(model_folder: Make, films: list[Path], tmp_path: Path) -> None:
    folder = model_folder(vit=True)
    settings = {"checkpoint": folder, "input": films[0].parent, "output": tmp_path / "p.csv", "workers": 0}
    found = pspg.predict(settings, device="cpu")
    rows = dict(zip(found.ids, found.probabilities, strict=True))
    paths = [films[0].parent / name for name in rows]
    expected = np.array(list(rows.values()))
    model = pspg.load_model(folder, device="cpu")
    assert repr(model) == f"Model(PsPG with decoder gru, VisionTransformer, 4 classes, 32 px, cpu, {folder})"
    assert model.class_names == found.class_names == model.training_classes
    arrays = [np.asarray(Image.open(path)) for path in paths]
    pixels = torch.stack([model.read(path) for path in paths])
    kinds = {
        "paths": paths,
        "texts": [str(path) for path in paths],
        "PIL": [Image.open(path) for path in paths],
        "colour": [Image.open(path).convert("RGB") for path in paths],
        "arrays": arrays,
        "one array": np.stack(arrays),
        "uint8 tensors": [torch.from_numpy(array.copy()) for array in arrays],
        "floats": [array / 255.0 for array in arrays],
        "read": pixels,
        "list of read": list(pixels),
        "generator": (path for path in paths),
    }
    for kind, images in kinds.items():
        np.testing.assert_allclose(model.probabilities(images, batch_size=2), expected, atol=1e-6, err_msg=kind)
    scored = model.score(paths)
    np.testing.assert_allclose(scored.probabilities, 1 / (1 + np.exp(-scored.logits)), atol=1e-12)
    np.testing.assert_allclose(model.probabilities(paths[0]), expected[:1], atol=1e-6)
    assert model.embed(paths).shape == (len(paths), 24)
    np.testing.assert_allclose(np.linalg.norm(model.embed(paths), axis=1), 1, atol=1e-6)
    assert model.maps(paths).shape == (len(paths), 4, 2, 2)


def test_new_class_names_and_prompts(model_folder: Make, films: list[Path]) -> None:
    folder = model_folder(vit=True)
    model = pspg.load_model(folder, device="cpu", blend="none")
    assert model.prompts().shape == (2, 4, 3, 16)
    before = model.probabilities(films)
    model.set_classes(NEW)
    assert model.class_names == NEW
    assert model.training_classes != NEW
    assert model.prompts().shape == (2, 3, 3, 16)
    found = model.probabilities(films)
    assert found.shape == (len(films), 3)
    model.set_classes(model.training_classes)
    np.testing.assert_array_equal(model.probabilities(films), before)
    batch = pspg.load_model(folder, device="cpu", context="batch", blend="none")
    assert np.abs(batch.probabilities(films) - before).max() > 1e-6
    with pytest.raises(pspg.UserError, match="duplicates"):
        model.set_classes(["a", "A"])
    np.testing.assert_array_equal(model.probabilities(films), before)


def test_a_classifier_scores_too(model_folder: Make, films: list[Path], tmp_path: Path) -> None:
    source = model_folder(vit=True)
    export = ["export-checkpoint", "--checkpoint", str(source), "--output", str(tmp_path / "shipped")]
    assert main([*export, "--layout", "classifier"]) == 0
    model, live = (pspg.load_model(folder, device="cpu") for folder in (tmp_path / "shipped", source))
    np.testing.assert_allclose(model.probabilities(films), live.probabilities(films), atol=1e-6)
    model.set_classes(["edema", "cardiomegaly"])
    assert repr(model).startswith("Model(frozen classifier, VisionTransformer, 2 classes, 32 px, cpu, ")
    np.testing.assert_allclose(model.probabilities(films), live.probabilities(films)[:, [2, 0]], atol=1e-6)
    with pytest.raises(pspg.UserError, match="the classes are frozen"):
        model.set_classes(["gallstone"])
    with pytest.raises(pspg.UserError, match="keeps no prompts"):
        model.prompts()
    classifier = pspg.load_classifier(tmp_path / "shipped")
    torch.testing.assert_close(classifier.read(Image.open(films[0])), classifier.read(films[0]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing.png", "missing.png: no such file"),
        (np.zeros((3, 4, 5, 6, 7)), r"images\[0\]: has the shape \(3, 4, 5, 6, 7\); an image is"),
        (np.full((9, 9), 2.0), r"images\[0\]: has floating-point pixels outside \[0, 1\]"),
        (np.full((9, 9), np.nan), "outside"),
        (np.full((9, 9), -1), "has pixels of int64; give uint8"),
        (np.zeros((9, 9, 3), np.uint16), "has colour of uint16"),
        (torch.zeros(3, 31, 32), r"has the shape \(3, 31, 32\); a tensor of `read` is \(3,32,32\)"),
        (None, "is of type NoneType; give a path"),
        ([], "images: there are none"),
    ],
)
def test_images_that_cannot_be_used_are_one_line(model_folder: Make, image: object, message: str) -> None:
    model = pspg.load_model(model_folder(), device="cpu")
    with pytest.raises(pspg.UserError, match=message) as caught:
        model.score(image)
    assert "\n" not in str(caught.value)


def test_16_bit_arrays_are_windowed_by_their_depth_as_files_are(model_folder: Make, tmp_path: Path) -> None:
    film = np.random.default_rng(0).integers(0, 4096, (40, 30), dtype=np.uint16)
    Image.fromarray(film).save(tmp_path / "film.png")
    model = pspg.load_model(model_folder(), device="cpu")
    for depth in (12, None):
        expected = model.read(tmp_path / "film.png", bit_depth=depth)
        torch.testing.assert_close(model.read(film, bit_depth=depth), expected, rtol=0, atol=0)
        torch.testing.assert_close(model.read(Image.open(tmp_path / "film.png"), bit_depth=depth), expected)
    film[0, 0] = 60000
    with pytest.raises(pspg.UserError, match="image: a 16-bit PNG of unknown depth"):
        model.read(film)

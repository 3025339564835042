"""`calibrate`: what it keeps with a model, who uses it, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score

import pspg.engine as pspg
from pspg.engine.checkpoints.calibration import read_calibration
from pspg.engine.checkpoints.classifier import load_classifier
from pspg.engine.checkpoints.run import load_tensors, write_tensors
from pspg.engine.cli import main
from tests.engine.seal import seal

Make = Callable[..., Path]


@pytest.fixture
def validation(tmp_path: Path, names: list[str], model_folder: Make) -> Path:
    """Twelve images of noise with labels that `model_folder(vit=True)` gets mostly right; the last class has none."""
    noise, folder = np.random.default_rng(1), tmp_path / "validation"
    folder.mkdir()
    for number in range(12):
        Image.fromarray(noise.integers(0, 256, (40, 40), dtype=np.uint8)).save(folder / f"{number}.png")
    rows = predict(model_folder(vit=True), folder, tmp_path / "validation.csv")
    scores = np.array([[float(row[name]) for name in names] for row in rows])
    labels = (scores > np.median(scores, axis=0)).astype(int)
    labels[[scores[:, 0].argmax(), scores[:, 0].argmin()]] ^= 1
    labels[:, -1] = 0
    lines = [
        {"id": row["id"], "filepath": row["id"], "labels": y.tolist()} for row, y in zip(rows, labels, strict=True)
    ]
    path = folder / "val.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    (folder / "classes.txt").write_text("\n".join(names) + "\n")
    return path


def calibrate(folder: Path, validation: Path, *arguments: str) -> int:
    command = ["calibrate", "--checkpoint", str(folder), "--manifest", str(validation), "--workers", "0"]
    return main([*command, "--min_positives", "2", *arguments])


def predict(folder: Path, images: Path, output: Path, *arguments: str) -> list[dict[str, str]]:
    command = [
        "predict",
        "--checkpoint",
        str(folder),
        "--input",
        str(images),
        "--output",
        str(output),
        "--workers",
        "0",
    ]
    assert main([*command, *arguments]) == 0
    with output.open(newline="") as file:
        return list(csv.DictReader(file))


def test_model_classifier_and_python_give_the_calibrated_scores(
    model_folder: Make,
    image_folder: Path,
    validation: Path,
    names: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = model_folder(vit=True)
    raw = predict(model, image_folder, tmp_path / "raw.csv")
    assert calibrate(model, validation) == 0
    output = capsys.readouterr()
    left = f"1 of {len(names)} classes are left as they are: {names[-1]}: no positives in the validation"
    assert f"the probabilities of {left}" in output.err.replace("\n", " ")
    assert "Thresholds: best F1" in output.out
    assert "in place of the one before" not in output.err.replace("\n", " ")
    assert calibrate(model, validation) == 0
    assert "in place of the one before" in capsys.readouterr().err.replace("\n", " ")
    kept = read_calibration(model)
    assert kept is not None
    assert [row.group for row in kept.classes] == [*names[:-1], None]
    found = predict(model, image_folder, tmp_path / "found.csv")
    assert "calibrated on val.jsonl" in capsys.readouterr().err
    for calibrated, table in ((True, found), (False, raw)):
        loaded = pspg.load_model(model, device="cpu", calibrated=calibrated)
        scored = loaded.score([image_folder / row["id"] for row in table])
        expected = [[float(row[name]) for name in names] for row in table]
        np.testing.assert_allclose(scored.probabilities, expected, rtol=0, atol=1e-6)
        np.testing.assert_equal(scored.thresholds, kept.thresholds() if calibrated else None)
    for before, after in zip(raw, found, strict=True):
        for row in kept.classes:
            expected = expit(row.slope * logit(float(before[row.name])) + row.intercept)
            assert float(after[row.name]) == pytest.approx(expected, abs=1e-6)
        above = [
            row.name for row in kept.classes if row.threshold is not None and float(after[row.name]) > row.threshold
        ]
        assert after["above threshold"] == "|".join(above)
    assert any(row["above threshold"] for row in found)
    assert predict(model, image_folder, tmp_path / "again.csv", "--calibrated", "false") == raw
    for layout, name in (("classifier", "shipped"), ("pspg-engine", "exported")):
        command = ["export-checkpoint", "--checkpoint", str(model), "--layout", layout]
        assert main([*command, "--output", str(tmp_path / name)]) == 0
        for one, other in zip(found, predict(tmp_path / name, image_folder, tmp_path / f"{name}.csv"), strict=True):
            for key in names:
                assert float(other[key]) == pytest.approx(float(one[key]), abs=1e-5)
            assert other["above threshold"] == one["above threshold"]
    classifier = load_classifier(tmp_path / "shipped")
    paths = [image_folder / row["id"] for row in found]
    scores = classifier(torch.stack([classifier.read(path) for path in paths]))
    np.testing.assert_allclose(scores, [[float(row[name]) for name in names] for row in found], atol=1e-5)
    some = [names[2], names[0]]
    classifier.set_classes(some)
    part = classifier(torch.stack([classifier.read(path) for path in paths]))
    torch.testing.assert_close(part, scores[:, [2, 0]])


def test_the_order_of_a_class_stays(
    model_folder: Make, image_folder: Path, validation: Path, names: list[str], tmp_path: Path
) -> None:
    model = model_folder(vit=True)
    before = predict(model, image_folder, tmp_path / "a.csv")
    assert calibrate(model, validation, "--point", "sensitivity", "--target", "0.8", "--method", "temperature") == 0
    after = predict(model, image_folder, tmp_path / "b.csv")
    labels = [1, 0, 1, 0, 0]
    for name in names:
        one, two = ([float(row[name]) for row in rows] for rows in (before, after))
        assert roc_auc_score(labels, one) == roc_auc_score(labels, two)
        assert np.argsort(one).tolist() == np.argsort(two).tolist()


def test_a_classifier_is_calibrated_in_place(
    model_folder: Make, image_folder: Path, validation: Path, tmp_path: Path
) -> None:
    model, shipped = model_folder(vit=True), tmp_path / "shipped"
    assert (
        main(["export-checkpoint", "--checkpoint", str(model), "--layout", "classifier", "--output", str(shipped)]) == 0
    )
    assert calibrate(shipped, validation) == 0
    assert calibrate(model, validation) == 0
    one, other = read_calibration(shipped), read_calibration(model)
    assert one is not None
    assert other is not None
    assert (one.blend, other.blend) == (None, "novelty")
    np.testing.assert_allclose(one.lines(), other.lines(), rtol=1e-3, atol=1e-4)
    assert "above threshold" in predict(shipped, image_folder, tmp_path / "s.csv")[0]
    for folder, more in ((shipped, []), (model, ["--evaluation.context", "bank", "--evaluation.blend", "novelty"])):
        report = tmp_path / f"report-{folder.name}"
        command = ["evaluate", "--checkpoint", str(folder), "--manifest", str(validation), "--output", str(report)]
        assert main([*command, "--workers", "0", "--evaluation.bootstrap", "0", *more]) == 0
        found = json.loads((report / "metrics.json").read_text())
        assert found["operating"]["after"]["brier"] < found["operating"]["before"]["brier"]
        assert found["operating"]["point"] == "best F1, on 12 validation images"
    assert calibrate(shipped, validation) == 0  # again, from the model's own scores
    again = read_calibration(shipped)
    assert again is not None
    torch.testing.assert_close(again.lines(), one.lines())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--class_names", "[edema, gallstone]"], "was fitted for another class list"),
        (["--blend", "none"], "was fitted under blend novelty of weight 4"),
        (["--context", "batch"], "the calibration is for bank"),
    ],
)
def test_it_is_not_used_for_scores_that_it_was_not_fitted_for(
    model_folder: Make,
    image_folder: Path,
    validation: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    reason: str,
) -> None:
    model = model_folder(vit=True)
    raw = predict(model, image_folder, tmp_path / "raw.csv", *arguments)
    assert calibrate(model, validation) == 0
    assert predict(model, image_folder, tmp_path / "found.csv", *arguments) == raw
    assert reason in capsys.readouterr().err


def test_other_weights_and_damage_are_told(
    model_folder: Make, image_folder: Path, validation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_folder(vit=True)
    assert calibrate(model, validation) == 0
    file = model / "calibration.json"
    text = file.read_text()
    capsys.readouterr()
    command = ["predict", "--checkpoint", str(model), "--input", str(image_folder), "--output", str(tmp_path / "o.csv")]
    for bad, message in (
        (text.replace('"images": 12', '"images": 11'), "wrong checksum"),
        (text.replace('"images": 12', '"images": 0'), "images must be a whole number"),
        ("{", "not readable as JSON"),
    ):
        file.write_text(bad)
        assert main([*command, "--workers", "0"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "calibration.json" in error
        assert error.count("\n") == 1
    file.write_text(text)
    tensors = load_tensors(model / "model.safetensors")
    write_tensors(model / "model.safetensors", {name: tensor * 1.01 for name, tensor in tensors.items()})
    seal(model)
    assert "above threshold" not in predict(model, image_folder, tmp_path / "p.csv")[0]
    assert "is of other weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "1.5"], "target: must be >= 0 and <= 1"),
        (["--groups", "{x: gone.txt}"], "groups.x: gone.txt: no such file"),
        (["--groups", "{x: CLASSES, y: CLASSES}"], "is in two groups"),
        (["--class_names", "[gallstone]"], "has no label of the 1 classes"),
    ],
)
def test_mistakes(
    model_folder: Make, validation: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    model = model_folder(vit=True)
    arguments = [word.replace("CLASSES", str(validation.parent / "classes.txt")) for word in arguments]
    assert calibrate(model, validation, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (model / "calibration.json").exists()

"""What `evaluate` sets side by side: other methods, a calibration, training, a gallery."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pspg.engine.checkpoints.model_folder import load_model
from pspg.engine.checkpoints.run import load_tensors, save_checkpoint
from pspg.engine.cli import main
from pspg.engine.utils.errors import UserError

CLASSES = ["edema", "cardiomegaly", "no finding"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Manifests of 30 training, 30 validation and 40 test images, and tables of two methods, ours.csv and other.csv."""
    rng = np.random.default_rng(0)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    ids, labels = [], []
    for split, count in (("train", 30), ("val", 30), ("test", 40)):
        rows = rng.integers(0, 2, (count, 3))
        rows[:, 2] *= split != "val"
        names = [f"{split}{n}.png" for n in range(count)]
        lines = [{"id": n, "filepath": n, "labels": row.tolist()} for n, row in zip(names, rows, strict=True)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        ids += names
        labels.append(rows)
    truth = np.concatenate(labels)
    for name, noise in (("ours", 0.6), ("other", 0.9)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            scores = np.clip(0.2 + 0.3 * truth + noise * rng.random(truth.shape) / 2, 0, 1)
            csv.writer(file).writerows(
                [["id", *CLASSES], *([i, *map(float, row)] for i, row in zip(ids, scores, strict=True))]
            )
    return tmp_path


def evaluate(folder: Path, *arguments: str) -> int:
    command = ["evaluate", "--predictions", str(folder / "ours.csv"), "--manifest", str(folder / "test.jsonl")]
    return main(
        [
            *command,
            "--output",
            str(folder / "report"),
            "--evaluation.bootstrap",
            "20",
            "--overwrite",
            "true",
            *arguments,
        ]
    )


def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report/metrics.json").read_text())
    return found


def test_tables_are_compared_on_the_same_images(folder: Path) -> None:
    other = folder / "other.csv"
    assert evaluate(folder, "--compare", json.dumps({"other": str(other)})) == 0
    found = document(folder)
    assert list(found["results"]) == ["ours", "other"]
    difference = found["differences"]["other"]["groups"]["all"]["macro_auc"]
    own, theirs = (found["results"][name]["all"]["macro_auc"] for name in ("ours", "other"))
    assert difference["value"] == own - theirs
    assert difference["interval"]["low"] < difference["value"] < difference["interval"]["high"]
    assert found["differences"]["other"]["classes"].keys() == set(CLASSES)
    assert "ours less the others" in (folder / "report/report.html").read_text()
    other.write_text("\n".join(line for line in other.read_text().splitlines() if not line.startswith("test3.png")))
    assert evaluate(folder, "--compare", json.dumps({"other": str(other)})) == 2
    assert evaluate(folder, "--compare", json.dumps({"other": str(other)}), "--on_bad_image", "skip") == 0
    assert {row["all"]["images"] for row in document(folder)["results"].values()} == {39}
    assert "test3.png" not in (folder / "report/predictions.csv").read_text()


def test_the_same_table_has_no_difference(folder: Path) -> None:
    assert evaluate(folder, "--compare", json.dumps({"again": str(folder / "ours.csv")})) == 0
    found = document(folder)["differences"]["again"]["groups"]["all"]
    assert {tuple(one["interval"].values())[:2] for one in found.values()} == {(0.0, 0.0)}


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"x": "gone.csv"}, "compare: x: gone.csv: no such file or folder"),
        ({"ours": "OTHER"}, "compare: 'ours' is a name that the report has already"),
        ({"template, a": "OTHER"}, "compare: 'template, a' is a name"),
        ({"x": "FOLDER"}, "not a run or model folder"),
    ],
)
def test_what_cannot_be_compared(
    folder: Path, capsys: pytest.CaptureFixture[str], compare: dict[str, str], message: str
) -> None:
    places = {"OTHER": str(folder / "other.csv"), "FOLDER": str(folder)}
    assert evaluate(folder, "--compare", json.dumps({k: places.get(v, v) for k, v in compare.items()})) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (folder / "report/report.html").exists()


def test_a_calibration_is_fitted_on_other_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--calibration", str(folder / "val.jsonl"), "--point", "sensitivity", "--target", "0.8"]
    assert evaluate(folder, *arguments, "--frequencies", str(folder / "train.jsonl")) == 0
    assert (
        "the probabilities of 1 of 3 classes are left as they are: no finding: no positives" in capsys.readouterr().err
    )
    found = document(folder)
    assert found["operating"]["after"]["brier"] < found["operating"]["before"]["brier"]
    assert found["operating"]["point"] == "sensitivity of at least 0.8, on 30 validation images"
    assert [row["name"] for row in found["operating"]["classes"]] == CLASSES[:2]
    assert found["fitted"]["data"].startswith("val.jsonl")
    page = (folder / "report/report.html").read_text()
    rows = re.findall(r'<tr><td class="name">([^<]*)</td><td>(\d+)</td></tr>', page)
    assert rows == [("training", "30"), ("validation, for the calibration", "30"), ("these images", "40")]


def test_a_gallery_has_pictures_only_when_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(folder) == 0
    assert "data:image/jpeg" not in (folder / "report/report.html").read_text()
    assert evaluate(folder, "--gallery", "2") == 2  # the images are not there
    assert "test" in capsys.readouterr().err
    for number in range(40):
        Image.new("L", (30, 20), number).save(folder / f"test{number}.png")
    assert evaluate(folder, "--gallery", "2") == 0
    page = (folder / "report/report.html").read_text()
    assert 4 <= page.count("data:image/jpeg") <= 8
    assert "Hits: present, and highest scored" in page


def test_a_gallery_of_a_model_has_maps(
    model_folder: Callable[..., Path], image_folder: Path, names: list[str], tmp_path: Path
) -> None:
    files = sorted(path.relative_to(image_folder).as_posix() for path in image_folder.rglob("*.png"))
    lines = [{"id": f, "filepath": f, "labels": [n % 2, 1, 0, 1 - n % 2]} for n, f in enumerate(files)]
    (image_folder / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (image_folder / "classes.txt").write_text("\n".join(names))
    model = model_folder(vit=True)
    command = ["evaluate", "--checkpoint", str(model), "--manifest", str(image_folder / "test.jsonl"), "--workers", "0"]
    more = ["--output", str(tmp_path / "report"), "--gallery", "1", "--evaluation.bootstrap", "5"]
    assert main([*command, *more, "--compare", json.dumps({"again": str(model)})]) == 0
    page = (tmp_path / "report/report.html").read_text()
    assert "data:image/jpeg" in page
    found = json.loads((tmp_path / "report/metrics.json").read_text())
    assert found["differences"]["again"]["groups"]["all"]["map_ap"]["value"] == 0


def test_checkpoints_of_a_run_are_methods_of_their_own(
    model_folder: Callable[..., Path], image_folder: Path, names: list[str], tmp_path: Path
) -> None:
    run = model_folder(vit=True)
    first = load_tensors(run / "model.safetensors")
    for step, scale in ((1, 1.0), (2, 1.5)):
        tensors = {"model": {name: scale * tensor for name, tensor in first.items()}}
        save_checkpoint(run, step, tensors, {"step": step, "best_step": 1})
    steps = [run / "checkpoints" / f"step-0000000{step}" for step in (1, 2)]
    assert load_model(run).weights == load_model(steps[0]).weights == steps[0] / "model.safetensors"
    files = sorted(path.relative_to(image_folder).as_posix() for path in image_folder.rglob("*.png"))
    lines = [{"id": f, "filepath": f, "labels": [n % 2, 1, 0, 1 - n % 2]} for n, f in enumerate(files)]
    (image_folder / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (image_folder / "classes.txt").write_text("\n".join(names))
    command = ["evaluate", "--checkpoint", str(steps[1]), "--manifest", str(image_folder / "test.jsonl")]
    more = ["--output", str(tmp_path / "report"), "--workers", "0", "--evaluation.bootstrap", "5"]
    assert main([*command, *more, "--compare", json.dumps({"run": str(run), "one": str(steps[0])})]) == 0
    found = json.loads((tmp_path / "report/metrics.json").read_text())["results"]
    assert found["run"] == found["one"] != found["PsPG"]
    exported = ["export-checkpoint", "--checkpoint", str(steps[1]), "--output", str(tmp_path / "exported")]
    assert main(exported) == 0
    for name, tensor in load_model(tmp_path / "exported").model.head.state_dict().items():
        assert (tensor == load_model(steps[1]).model.head.state_dict()[name]).all()
    (steps[1] / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="step-00000002"):
        load_model(steps[1])

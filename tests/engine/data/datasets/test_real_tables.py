"""Preparing on the official tables that torchxrayvision carries."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pspg.engine.cli import main
from pspg.engine.data.datasets import chestxray14, chexpert, padchest, vindr_cxr
from pspg.engine.data.manifest import load_label_names
from pspg.engine.data.phantoms.drawing import draw_radiograph
from pspg.engine.data.preparation.counts import digest
from pspg.engine.data.preparation.rows import Journal

PADCHEST = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
NIH = "Data_Entry_2017_v2020.csv"
CHEXPERT = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "Edema", "Fracture"]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to the real tables, under their official names; the package itself is not imported."""
    spec = importlib.util.find_spec("torchxrayvision")
    assert spec is not None, "pip install torchxrayvision, which carries the tables"
    data = Path(next(iter(spec.submodule_search_locations or [])), "data")
    folder = tmp_path_factory.mktemp("real")
    links = {
        "chexpert/train.csv.gz": "chexpert_train.csv.gz",
        "kaggle/train.csv.gz": "vinbigdata-train.csv.gz",
        f"nih/{NIH}.gz": f"{NIH}.gz",
        f"padchest/{PADCHEST}.gz": f"{PADCHEST}.gz",
    }
    for link, table in links.items():
        (folder / link).parent.mkdir()
        (folder / link).symlink_to(data / table)
    with gzip.open(folder / "chexpert/train.csv.gz", "rt") as file:
        (folder / "chexpert/valid.csv").write_text(file.readline())
    return folder


def manifest(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_real_padchest(real: Path) -> None:
    """Table 4 of the paper."""
    journal = Journal()
    classes, rows = padchest.read(padchest.PadChestConfig(source=str(real / "padchest")), journal)
    assert (len(rows), len(classes)) == (26_432, 108)
    assert {"normal", "exclude", "unchanged", "suboptimal study"} <= set(classes)
    assert digest(rows) == "238e710370da55c2"  # quoted beside the studies
    positives = np.array([row.labels for row in rows]).sum(0)
    assert (positives.min(), positives.max() < len(rows)) == (51, True)
    assert sum(len(entries) for reason, entries in journal.dropped.items() if "class" not in reason) == 160_861 - 26_432
    shares = Counter(row.split for row in rows)
    assert abs(shares["test"] / len(rows) - 0.2) < 0.01
    assert abs(shares["val"] / len(rows) - 0.1) < 0.01


def test_real_padchest_without_what_is_no_finding(real: Path) -> None:
    source = str(real / "padchest")
    sizes = {}
    for choice in ("drop_classes", "drop_images"):
        config = padchest.PadChestConfig(source=source, not_findings=choice)  # type: ignore[arg-type]
        classes, rows = padchest.read(config, Journal())
        assert not {"exclude", "unchanged", "suboptimal study"} & set(classes)
        assert "normal" in classes
        sizes[choice] = (len(rows), len(classes))
    assert sizes["drop_classes"] == (26_432, 105)
    assert sizes["drop_images"][0] < 26_432


def test_real_chexpert(real: Path) -> None:
    """Table 4 of the paper."""
    journal = Journal()
    classes, rows = chexpert.read(chexpert.CheXpertConfig(source=str(real / "chexpert")), journal)
    collected = list(rows)
    assert (len(collected), len(classes)) == (191_027, 14)
    assert digest(collected) == "75a116e746eb1c3b"
    assert len(journal.dropped["lateral view"]) == 223_414 - 191_027
    assert {value for row in collected[:1000] for value in row.labels or []} == {1, 0, -1, None}
    assert (collected[0].candidates[0], collected[0].patient) == (
        "train/patient00001/study1/view1_frontal.jpg",
        "patient00001",
    )


def test_real_chestxray14(real: Path) -> None:
    config = chestxray14.ChestXray14Config(source=str(real / "nih"), split="hash")
    classes, rows = chestxray14.read(config, Journal())
    assert (len(rows), len(classes)) == (112_120, 15)
    column = classes.index("Pleural Thickening")
    assert sum(row.labels[column] == 1 for row in rows if row.labels) == 3_385
    assert len({(row.patient, row.split) for row in rows}) == len({row.patient for row in rows}) == 30_805


def test_real_vinbigdata(real: Path) -> None:
    classes, rows = vindr_cxr.read(vindr_cxr.VinDrConfig(source=str(real / "kaggle")), Journal())
    collected = list(rows)
    assert (len(collected), len(classes), classes[-1]) == (15_000, 15, "No finding")
    assert sum(row.labels[-1] == 1 for row in collected if row.labels) == 10_606
    assert all(any(row.labels[:-1]) != row.labels[-1] for row in collected if row.labels and row.labels[-1])


@pytest.mark.slow
def test_training_on_real_padchest_labels(
    real: Path, tmp_path: Path, settings: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Sixty-four real rows of 108 classes, drawn radiographs in place of the real ones, three steps of phase 2."""
    source = ["prepare", "padchest", "--source", str(real / "padchest"), "--salt", "pepper"]
    assert main([*source, "--output", str(tmp_path / "all"), "--missing", "keep"]) == 0
    images = tmp_path / "images"
    rng = np.random.default_rng(0)
    for row in manifest(tmp_path / "all", "train")[:48] + manifest(tmp_path / "all", "val")[:16]:
        path = images / row["filepath"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_radiograph([], 64, rng)).save(path)
    data = tmp_path / "data"
    assert main([*source, "--output", str(data), "--image_root", str(images), "--missing", "skip"]) == 0
    assert "26,368 × missing image" in capsys.readouterr().out
    assert len(load_label_names(data / "classes.txt")) == 108
    pixels = json.loads((data / "statistics.json").read_text())["pixels"]
    assert 0 < pixels["mean"] < 1
    assert pixels["images"] == 48
    kept = {row["id"]: row for row in manifest(data, "train")}
    assert kept == {row["id"]: row for row in manifest(tmp_path / "all", "train")[:48]}
    arguments = {
        "data.train": data / "train.jsonl",
        "data.val": data / "val.jsonl",
        "data.image_root": images,
        "output": tmp_path / "run",
        "batch_size": 16,
        "optim.epochs": 1,
        "optim.warmup_epochs": 0,
        "data.flip": 0,
    }
    words = [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    assert main([*settings("prompt"), *words]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert len(losses) == 3
    assert np.isfinite(losses).all()

"""The examples of the guide run as they stand there."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from pspg.engine import cli
from pspg.engine.data import datasets

GUIDE = Path(datasets.__file__).parents[1] / "README.md"
SAVE, DRAW, CLINIC, LOADER = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
(COMMAND,) = re.findall(r"^pspg-engine (prepare clinic .*)$", GUIDE.read_text(), re.MULTILINE)


def test_a_data_set_is_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("added").mkdir()
    Path("added/clinic.py").write_text(CLINIC)
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(tmp_path / "added")])
    for name, command in cli.prepare_commands().items():
        monkeypatch.setitem(cli.COMMANDS, name, command)
    Path("downloads").mkdir()
    with Path("downloads/findings.csv").open("w", newline="") as file:
        rows = [
            (f"{number}.png", f"person {number // 2}", ("", "mass;edema", "edema")[number % 3]) for number in range(9)
        ]
        csv.writer(file).writerows([("file", "person", "diagnoses"), *rows])
    for number in range(9):
        Image.linear_gradient("L").save(f"downloads/{number}.png")
    assert cli.main(shlex.split(COMMAND)) == 0, capsys.readouterr().err
    assert "left out: 3 × no diagnosis, e.g. findings.csv:2 0.png" in capsys.readouterr().out
    assert Path("data/clinic/classes.txt").read_text() == "edema\nmass\n"
    lines = [json.loads(line) for path in Path("data/clinic").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert {line["id"]: line["labels"] for line in lines}["1.png"] == [1, 1]
    assert len(lines) == 6


def test_batches_in_python(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "phantoms").symlink_to(phantoms)
    monkeypatch.chdir(tmp_path)
    exec(compile(LOADER, str(GUIDE), "exec"), {})
    first, *_, bad = capsys.readouterr().out.splitlines()
    assert "torch.Size([4, 3, 64, 64])" in first
    assert bad == "{}"


def test_images_of_a_hugging_face_data_set_become_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows as `datasets` gives them: dicts with a PIL image."""
    recipe: dict = {}
    exec(compile(SAVE, str(GUIDE), "exec"), recipe)
    rows = [{"image": Image.new("L", (16, 16), 20 * number), "labels": [number % 2]} for number in range(10)]
    recipe["save_images"](rows, tmp_path / "images", ["edema", "mass"])
    folder = str(tmp_path / "images")
    words = ["prepare", "table", "--source", folder, "--table", f"{folder}/labels.csv", "--output", f"{tmp_path}/out"]
    assert cli.main(words) == 0, capsys.readouterr().err
    lines = [json.loads(line) for path in tmp_path.glob("out/*.jsonl") for line in path.read_text().splitlines()]
    assert {line["filepath"]: line["labels"] for line in lines}["00000001.png"] == [0, 1]
    assert len(lines) == 10


def test_phantoms_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(compile(DRAW, str(GUIDE), "exec"), found)
    assert found["pixels"].shape == (224, 224)
    pixels, row = found["draw_phantom"](found["PhantomConfig"](classes=20), "train", 3)
    written = [json.loads(line) for line in Path("phantoms/train.jsonl").read_text().splitlines()]
    assert row == written[3]
    with Image.open(Path("phantoms", row["filepath"])) as image:
        assert image.tobytes() == pixels.tobytes()


def test_the_long_tailed_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = re.findall(r"^pspg-engine (prepare table (?:.*\\\n)+.*)$", GUIDE.read_text(), re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    Path("mimic-cxr-jpg").mkdir()
    columns = ["dicom_id", "subject_id", "study_id", "ViewPosition", "Atelectasis", "Hernia"]
    for number, name in enumerate(("train", "development", "test")):
        with Path(f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([columns, [f"d{number}", f"1{number}", f"5{number}", "PA", 1, 0]])
    assert cli.main([*shlex.split(command.replace("\\\n", " ")), "--missing", "keep"]) == 0, capsys.readouterr().err
    assert Path("data/cxr-lt/classes.txt").read_text() == "Atelectasis\nHernia\n"
    assert json.loads(Path("data/cxr-lt/val.jsonl").read_text())["filepath"] == "files/p11/p11/s51/d1.jpg"


def test_every_data_set_has_a_row() -> None:
    named = re.findall(r"^\| `([\w-]+) --source", GUIDE.read_text(), re.MULTILINE)
    assert sorted(named) == sorted(dataset.name for dataset in datasets.all_datasets())

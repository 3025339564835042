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
CLINIC, LOADER = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
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


def test_every_data_set_has_a_row() -> None:
    named = re.findall(r"^\| `([\w-]+) --source", GUIDE.read_text(), re.MULTILINE)
    assert sorted(named) == sorted(dataset.name for dataset in datasets.all_datasets())

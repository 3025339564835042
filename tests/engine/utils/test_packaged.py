"""Configurations are found as given, then beside the YAML file that names them, then among the packaged ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pspg.engine.cli import main, parse
from pspg.engine.utils.packaged import CONFIGS, SUFFIXES, find_file, near_names, packaged_names


def test_every_packaged_file_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = packaged_names()
    assert {Path(name).suffix for name in names} == set(SUFFIXES)
    for name in names:
        assert find_file(name) == find_file(f"configs/{name}") == str(CONFIGS / name)


def test_the_order_of_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    beside = tmp_path / "beside"
    assert find_file("demo.yaml", [beside]) == str(CONFIGS / "demo.yaml")
    beside.mkdir()
    (beside / "demo.yaml").touch()
    assert find_file("demo.yaml", [beside]) == str(beside / "demo.yaml")
    (tmp_path / "demo.yaml").touch()
    assert find_file("demo.yaml", [beside]) == "demo.yaml"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("zero_shot_large.yaml", "studies/phantom/zero_shot_large.yaml"),  # by its last part
        ("table1.yaml", None),  # two have it
        ("../configs/demo.yaml", None),
        ("/demo.yaml", None),
        ("", None),
        ("configs", None),
        ("x" * 5000, None),
        ("a\0b", None),
    ],
)
def test_names_of_packaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, found: str | None) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_file(name) == (found and str(CONFIGS / found))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("table1.yaml", ["studies/phantom/table1.yaml", "studies/table1.yaml"]),
        ("configs/chexpert_phase_2.yaml", ["chexpert_phase2.yaml"]),
        ("launch/torchrun2.sh", ["launch/torchrun.sh"]),
        ("none.yaml", []),
    ],
)
def test_a_missing_file_is_told_with_its_neighbours(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    near: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(other in near_names(name) for other in near)
    assert bool(near_names(name)) == bool(near)
    assert main(["train", "--config", name]) == 2
    assert capsys.readouterr().err == f"pspg-engine train: error: config: {name}: no such file{near_names(name)}\n"


@pytest.mark.parametrize(
    "words", [["demo_phase1.yaml"], ["--config", "demo_phase1.yaml"], ["--config=demo_phase1.yaml"]]
)
def test_training_takes_a_packaged_file_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO", "pspg"):
        _, config = parse(["train", *words])
    assert config.output == "runs/demo/phase1"
    assert config.model.backbone == str(CONFIGS / "demo_clip.json")
    assert str(CONFIGS / "demo_phase1.yaml") in caplog.text


def test_files_beside_the_yaml_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for name in ("small.json", "foreign.py", "phase2.yaml"):
        (own / name).touch()
    (own / "train.yaml").write_text("model: {backbone: small.json}")
    (own / "evaluate.yaml").write_text("clip: small.json\nadapter: foreign.py")
    (own / "leave_out.yaml").write_text("train: phase2.yaml")
    (own / "study.yaml").write_text(
        "runs: {a: {config: phase2.yaml}, b: {config: chexpert_phase2.yaml}, c: {}}\n"
        "rows: [{name: a, run: a}, {name: b, clip: small.json}, {name: c, adapter: foreign.py}, {name: d, clip: RN50}]"
    )
    monkeypatch.chdir(tmp_path)

    def settings(command: str, file: str) -> Any:
        return parse([command, f"own/{file}"])[1]

    assert settings("train", "train.yaml").model.backbone == "own/small.json"
    evaluation = settings("evaluate", "evaluate.yaml")
    assert (evaluation.clip, evaluation.adapter) == ("own/small.json", "own/foreign.py")
    assert settings("leave-out", "leave_out.yaml").train == "own/phase2.yaml"
    study = settings("study", "study.yaml")
    configs = [run.config for run in study.runs.values()]
    assert configs == ["own/phase2.yaml", str(CONFIGS / "chexpert_phase2.yaml"), None]
    sources = [(row.clip, row.adapter) for row in study.rows]
    assert sources == [(None, None), ("own/small.json", None), (None, "own/foreign.py"), ("RN50", None)]


def test_nothing_named_stays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(["evaluate"])[1].clip is None
    assert parse(["train"])[1].model.backbone == "RN50"
    assert parse(["train", "--model.backbone", "none.json"])[1].model.backbone == "none.json"


def test_help_tells_where_the_packaged_files_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert str(CONFIGS) in "".join(capsys.readouterr().out.split())

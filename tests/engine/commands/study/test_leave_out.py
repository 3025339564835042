"""Classes left out of the training: what is run, what the means are of, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pspg.engine.cli import main, parse
from pspg.engine.commands.study import leave_out as command
from pspg.engine.commands.study import run as runner
from pspg.engine.commands.study.config import LeaveOutConfig
from pspg.engine.commands.study.plan import Step, make_plan

NAMES = ["effusion", "left effusion", "nodule", "edema"]
ROOT = Path(__file__).parents[4]


def config(tmp_path: Path, **changes: Any) -> LeaveOutConfig:
    (tmp_path / "train.yaml").write_text("task: prompt\n")
    settings: dict[str, Any] = {
        "train": str(tmp_path / "train.yaml"),
        "settings": {"data.train": "t.jsonl"},
        "class_names": NAMES,
        "groups": {"Effusion": ["effusion", "left effusion"], "edema": ["edema"]},
        "manifest": "val.jsonl",
        "output": str(tmp_path / "out"),
        "weights": [2.0, 4.0],
    }
    return LeaveOutConfig(**{**settings, **changes})


def test_a_run_for_each_group_without_its_classes(tmp_path: Path) -> None:
    plan = make_plan(command.make_study(config(tmp_path, seeds=[0, 1])))
    runs = [step for step in plan.steps if step.command == "train"]
    assert [step.title for step in runs] == ["Effusion, seed 0", "Effusion, seed 1", "edema, seed 0", "edema, seed 1"]
    classes = [Path(step.settings["data.class_names"]).read_text().split("\n")[:-1] for step in runs[::2]]
    assert classes == [["nodule", "edema"], ["effusion", "left effusion", "nodule"]]
    evaluations = [step for step in plan.steps if step.command == "evaluate"]
    assert len(evaluations) == 2 * 2 * 4
    lists = evaluations[0].settings["class_lists"]
    assert Path(lists["Left out"]).read_text() == "effusion\nleft effusion\n"
    assert {step.settings.get("evaluation.blend_weight") for step in evaluations} == {None, 2.0, 4.0}
    assert all(step.settings["manifest"] == "val.jsonl" for step in evaluations)


def test_means_are_over_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(step: Step, processes: int) -> int:
        step.folder.mkdir(parents=True)
        if step.command == "evaluate":
            left_out = Path(step.settings["class_lists"]["Left out"]).read_text().split("\n")[0]
            value = {"effusion": 0.6, "edema": 0.8}[left_out] + 0.01 * step.settings.get("evaluation.blend_weight", 0)
            found = {"macro_auc": value, "map_ap": None if left_out == "edema" else 0.25}
            results = {name: {"Left out": found, "Kept": found} for name in ("PsPG", "template, positive–negative")}
            (step.folder / "metrics.json").write_text(json.dumps({"results": results}))
        else:
            (step.folder / "metrics.jsonl").write_text("")
            (step.folder / "config.yaml").write_text("batch_size: 4\noptim: {accumulate: 1}\n")
        (step.folder / runner.DONE).write_text("{}")
        return 0

    monkeypatch.setattr(runner, "run", run)
    page = command.leave_out(config(tmp_path))
    lines = page.read_text().splitlines()
    assert lines[0].startswith("Means over 2 groups (Effusion, edema)")
    assert "| prompts | 70.0 | 25.0 | 70.0 | 25.0 |" in lines
    assert "| templates | 70.0 | 25.0 | 70.0 | 25.0 |" in lines
    assert "| novelty blend, weight 4 | 74.0 | 25.0 | 74.0 | 25.0 |" in lines
    assert (page.parent / "means.csv").is_file()
    assert (page.parent / "table.md").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": {}}, "groups: name the classes to leave out"),
        ({"groups": {"a": ["edema", "odema"]}}, "groups: a: unknown class name 'odema'"),
        ({"groups": {"a": NAMES}}, "groups: a: leaves out 4 of 4 classes"),
        ({"groups": {"a": []}}, "groups: a: leaves out 0 of 4 classes"),
        ({"class_names": ""}, "class_names: give the training classes"),
        ({"manifest": ""}, "manifest: is required"),
        ({"weights": [-1]}, "weights"),
    ],
)
def test_settings_that_cannot_be_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(json.dumps({**vars(config(tmp_path)), **changes}))
    assert main(["leave-out", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_demo_s_file_is_one() -> None:
    _, settings = parse(["leave-out", str(ROOT / "configs/leave_out/demo.yaml")])
    assert len(settings.groups) == 4

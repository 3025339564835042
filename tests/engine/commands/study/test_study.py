"""Studies: what they run, what they never run twice, and the tables they write."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pspg.engine.cli import main, parse
from pspg.engine.commands.study import run as runner
from pspg.engine.commands.study.config import DataSet, RowSpec, RunSpec, StudyConfig
from pspg.engine.commands.study.plan import Step, make_plan
from pspg.engine.commands.study.table import Result, Table, write_table
from pspg.engine.utils.errors import UserError

TABLES = sorted(Path(__file__).parents[4].glob("configs/studies/**/*.yaml"))


def study(**changes: Any) -> StudyConfig:
    """Two runs, one of which starts from the other's head, on two class lists of one split."""
    settings: dict[str, Any] = {
        "title": "A table",
        "output": "out",
        "work": "work",
        "phantoms": {"films": {"train": 8}},
        "runs": {
            "base": RunSpec(settings={"data.train": "${data:films}/train.jsonl"}, seeded=False),
            "tuned": RunSpec(settings={"model.pretrained_head": "${run:base}"}),
        },
        "data_sets": {
            "seen": DataSet(manifest="${data:films}/test.jsonl", group="seen"),
            "unseen": DataSet(manifest="${data:films}/test.jsonl", group="unseen"),
        },
        "rows": [RowSpec(name="base", run="base"), RowSpec(name="tuned", run="tuned", home=["seen"])],
        "metrics": ["macro_auc"],
    }
    return StudyConfig(**{**settings, **changes})


def test_steps_come_after_what_they_need_and_once() -> None:
    plan = make_plan(study(seeds=[0, 1]))
    found = [(step.command, step.title) for step in plan.steps]
    assert found == [
        ("phantom", "films"),
        ("train", "base"),
        ("evaluate", "base on seen, seed 0"),
        ("train", "tuned, seed 0"),
        ("evaluate", "tuned on seen, seed 0"),
        ("train", "tuned, seed 1"),
        ("evaluate", "tuned on seen, seed 1"),
    ]
    films, base, _, tuned, *_ = plan.steps
    assert base.words()[:3] == ["train", "--data.train", f"{films.folder}/train.jsonl"]
    assert tuned.settings == {"model.pretrained_head": str(base.folder), "seed": 0}
    assert len(plan.cells) == 8


def test_other_settings_are_another_folder() -> None:
    """What lies in a folder was made with the settings it is named after, those of what it needs included."""
    before = make_plan(study()).steps
    runs = {**study().runs, "base": RunSpec(settings={"data.train": "${data:films}/train.jsonl", "optim.lr": 1e-3})}
    after = make_plan(study(runs={**runs, "base": RunSpec(settings=runs["base"].settings, seeded=False)})).steps
    same = [a.folder == b.folder for a, b in zip(before, after, strict=True)]
    assert same == [True, False, False, False, False]
    assert [step.folder for step in make_plan(study(title="Other", output="elsewhere")).steps] == [
        step.folder for step in before
    ]


def row(**source: Any) -> dict[str, Any]:
    return {"rows": [RowSpec(name="a row", **source)]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"title": ""}, "title: is required"),
        ({"rows": []}, "rows: is required"),
        ({"seeds": [1, 1]}, "seeds: must differ"),
        (row(), "number 1 ('a row') needs one of run, checkpoint, clip, predictions, adapter; it has none"),
        (row(run="base", clip="RN50"), "it has run and clip"),
        (row(run="nothing"), "runs has no 'nothing'"),
        (row(run="base", home=["nowhere"]), "data_sets has no 'nowhere'"),
        (row(run="base", quoted={"seen": [1.0, 2.0]}), "quoted seen has 2 numbers for 1 metrics"),
        (row(predictions={"seen": "a.csv"}), "predictions must name a file for each of seen, unseen"),
        ({**row(run="a"), "runs": {"a": RunSpec(settings={"x": "${run:a}"})}}, "a run cannot need itself"),
        ({**row(run="a"), "runs": {"a": RunSpec(settings={"x": "${data:none}"})}}, "phantoms: there is no 'none'"),
        ({**row(run="a"), "runs": {"a": RunSpec(settings={"x": "${runs:a}"})}}, "write ${data:NAME} or ${run:NAME}"),
        ({**row(run="a"), "runs": {"a": RunSpec(settings={"output": "x"})}}, "output is chosen by the study"),
        ({**row(run="a"), "runs": {"a": RunSpec(config="no.yaml")}}, "no.yaml: cannot be read"),
        ({"rows": [RowSpec(name="a", run="base")] * 2}, "'a' is there 2 times in one section"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        make_plan(study(**changes))
    assert message in str(error.value)


@pytest.mark.parametrize("file", TABLES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_tables_here_can_be_planned(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[4])
    if "plugins:" in file.read_text():  # in a process of its own: what is registered stays registered
        subprocess.run([sys.executable, __file__, str(file)], check=True)
    else:
        check_plan(file)


def check_plan(file: Path) -> None:
    """Every run's settings are settings of `train`, every evaluation's of `evaluate`."""
    name, config = parse(["study", str(file)])
    assert name == "study"
    alike = {
        (step.command, *step.settings) if step.command == "evaluate" else step.folder: step
        for step in make_plan(config).steps
    }
    for step in alike.values():
        assert parse(step.words())[0] == step.command


def result(value: float | None, **facts: Any) -> Result:
    spread = None if value is None else {"low": value - 0.1, "high": value + 0.1, "resamples": 9}
    return Result("ok", {"macro_auc": value}, {"macro_auc": spread}, **facts)


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_table(tmp_path: Path) -> None:
    rows = [
        RowSpec(name="base | <b>", run="base", quoted={"seen": [99.0]}),
        RowSpec(name="tuned", run="tuned", home=["seen"]),
        RowSpec(name="elsewhere", quoted={"unseen": [12.3]}),
    ]
    config = study(rows=rows, intervals=True)
    facts = {"parameters": 12_604_416, "peak_bytes": 2**30, "step_seconds": 0.0123}
    results = {
        (0, "seen", 0): result(0.5, **facts),
        (0, "unseen", 0): result(None, parameters=1024),
        (1, "seen", 0): result(0.75),
        (1, "unseen", 0): Result("failed"),
    }
    page = write_table(tmp_path, Table(config, results)).read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    lines = (tmp_path / "table.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table == [
        "| Method | \\#P | Peak memory | Time a step | seen Macro AUC | unseen Macro AUC |",
        "|---|--:|--:|--:|--:|--:|",
        "| base \\| &lt;b&gt; | 12.60M | 1.00 GiB | 12.3 ms | 50.0 (40.0, 60.0) | – |",
        "| *base \\| &lt;b&gt; (as quoted)* | – | – | – | 99.0 | – |",
        "| tuned | – | – | – | **75.0\\*** (65.0, 85.0) | failed |",
        "| *elsewhere (as quoted)* | – | – | – | – | 12.3 |",
    ]
    assert "- Not complete: tuned (failed)." in lines
    found = read(tmp_path)
    assert [line["method"] for line in found] == ["base | <b>", "base | <b>", "tuned", "elsewhere"]
    assert found[0]["seen macro_auc low"] == "40.0"
    assert found[0]["parameters"] == "12604416"
    assert (found[1]["quoted"], found[2]["status"]) == ("yes", "failed")


def test_means_over_seeds(tmp_path: Path) -> None:
    config = study(rows=[RowSpec(name="base", run="base")], seeds=[0, 1, 2])
    values = {0: 0.7, 1: 0.8, 2: 0.9}
    results = {(0, name, seed): result(value) for name in ("seen", "unseen") for seed, value in values.items()}
    write_table(tmp_path, Table(config, results))
    (line,) = read(tmp_path)
    # Student's t of two degrees of freedom at 97.5 % is 4.303, the standard error 10/√3.
    assert float(line["seen macro_auc low"]) == pytest.approx(80 - 4.3027 * 10 / 3**0.5, abs=1e-3)
    assert "80.0 ± 24.8" in (tmp_path / "table.md").read_text()
    results[0, "seen", 1] = Result("not run")
    write_table(tmp_path, Table(config, results))
    (line,) = read(tmp_path)
    assert (line["status"], line["seen macro_auc"]) == ("not run", "")


def test_a_broken_step_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what has been done is not done again."""
    ran: list[str] = []

    def fake(step: Step, processes: int) -> int:
        ran.append(step.title)
        if step.title == "tuned, seed 0":
            return 2
        step.folder.mkdir(parents=True)
        metrics = {"macro_auc": 0.5, "intervals": None}
        document = {"results": {"PsPG": {"seen": metrics, "unseen": metrics}}}
        (step.folder / "metrics.json").write_text(json.dumps(document))
        (step.folder / "config.yaml").write_text(yaml.safe_dump({"batch_size": 8, "optim": {"accumulate": 2}}))
        (step.folder / "metrics.jsonl").write_text(
            '{"step": 1, "images_per_s": 32.0}\n{"step": 1, "peak_bytes": [5, 7]}\n'
        )
        (step.folder / runner.DONE).write_text("{}")
        return 0

    monkeypatch.setattr(runner, "run", fake)
    config = study(work=str(tmp_path / "work"), output=str(tmp_path / "out"))
    for expected in (["films", "base", "base on seen", "tuned, seed 0"], ["tuned, seed 0"]):
        ran.clear()
        with pytest.raises(
            UserError, match="1 of 5 steps failed: train tuned, seed 0 ended with status 2; 1 steps that need"
        ):
            runner.study(config)
        assert ran == expected
    first, second = read(tmp_path / "out")
    assert (first["seen macro_auc"], first["peak_bytes"], first["seconds_per_step"]) == ("50.0", "7", "0.5")
    assert second["status"] == "failed"


@pytest.mark.slow
def test_a_study_from_phantoms_to_the_table(
    tmp_path: Path, settings: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, fine-tuning on other classes, evaluation; the second call runs nothing."""
    words = settings("prompt")
    base = {key.removeprefix("--"): value for key, value in zip(words[1::2], words[2::2], strict=True)}
    base = {key: value for key, value in base.items() if key not in ("data.train", "data.val", "output")}
    films = {"data.train": "${data:films}/train.jsonl", "optim.epochs": 1}
    document = {
        "title": "Two rows",
        "output": str(tmp_path / "table"),
        "work": str(tmp_path / "work"),
        "phantoms": {"films": {"train": 24, "val": 0, "test": 12, "image_size": 32, "classes": 14}},
        "runs": {
            "seen": {"settings": {**base, **films, "data.class_names": "${data:films}/seen.txt"}},
            "both": {"settings": {**base, **films, "model.pretrained_head": "${run:seen}"}},
        },
        "data_sets": {"films": {"manifest": "${data:films}/test.jsonl"}},
        "rows": [{"name": "seen", "run": "seen"}, {"name": "then all", "run": "both"}],
        "evaluation": {"baselines": False, "evaluation.bootstrap": 5, "workers": 0},
    }
    file = tmp_path / "table.yaml"
    file.write_text(yaml.safe_dump(document))
    assert main(["study", str(file)]) == 0
    lines = read(tmp_path / "table")
    assert [line["status"] for line in lines] == ["ok", "ok"]
    assert all(float(line["films macro_auc"]) > 0 for line in lines)
    assert all(float(line["seconds_per_step"]) > 0 and int(line["peak_bytes"]) > 0 for line in lines)
    monkeypatch.setattr(runner, "run", None)
    assert main(["study", str(file)]) == 0


if __name__ == "__main__":
    check_plan(Path(sys.argv[1]))

"""Whole commands on tiny data: evaluate, predict, import, export, and what they say to wrong input."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pspg.engine.checkpoints.run import last_checkpoint, load_tensors, write_tensors
from pspg.engine.cli import main
from pspg.engine.commands.evaluate import evaluate_model
from pspg.engine.commands.predict import predict
from pspg.engine.commands.settings import PredictConfig
from pspg.engine.config import EvaluationConfig
from pspg.engine.evaluation.config import REPORT, EvaluateConfig
from pspg.engine.evaluation.report.tables import data_tables
from tests.engine.seal import seal


@pytest.fixture(scope="module")
def runs(phantoms: Path, settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phase-1 run `one` and on it a phase-2 run `two`, one epoch each."""
    folder = tmp_path_factory.mktemp("runs")
    assert main([*settings("contrastive"), "--output", str(folder / "one"), "--optim.epochs", "1"]) == 0
    arguments = [*settings("prompt"), "--output", str(folder / "two"), "--optim.epochs", "1"]
    seen = ["--data.class_names", str(phantoms / "seen.txt"), "--model.pretrained", str(folder / "one")]
    assert (
        main([*arguments, *seen, "--data.augment", "false", "--data.flip", "0", "--data.cache_features", "true"]) == 0
    )
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def values(path: Path) -> np.ndarray:
    return np.array([[float(v) for k, v in row.items() if k != "id"] for row in rows(path)])


def test_phase_2_keeps_the_backbone_and_saves_only_what_trains(runs: Path) -> None:
    one, two = last_checkpoint(runs / "one"), last_checkpoint(runs / "two")
    assert one is not None
    assert two is not None
    trained = {name.removeprefix("clip."): t for name, t in load_tensors(one / "model.safetensors").items()}
    frozen = load_tensors(runs / "two" / "clip.safetensors")
    assert trained.keys() == frozen.keys()
    assert all(trained[name].equal(frozen[name]) for name in trained)
    names = load_tensors(two / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"prompt_learner", "channel_attention", "logit_scale"}


def test_evaluate_writes_the_report_and_prints_its_summary(
    runs: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = {"seen": str(phantoms / "seen.txt"), "unseen": str(phantoms / "unseen.txt")}
    config = EvaluateConfig(
        checkpoint=str(runs / "two"),
        manifest=str(phantoms / "test.jsonl"),
        output=str(tmp_path / "report"),
        class_lists=lists,
        probe=str(phantoms / "train.jsonl"),
        workers=0,
        evaluation=EvaluationConfig(bootstrap=20, batch_size=16),
    )
    evaluation = evaluate_model(config)
    document = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert document["settings"]["context"] == "batch"
    assert document["settings"]["batch_size"] == 16
    assert list(document["results"]) == [
        "PsPG",
        "template, positive–negative",
        "template, positive only",
        "template, plain name",
        "ridge probe (ceiling)",
        "text-informed probe",
    ]
    assert all(list(groups) == ["all", "seen", "unseen"] for groups in document["results"].values())
    assert len(rows(tmp_path / "report" / "predictions.csv")) == 40
    assert evaluation is not None
    tables = data_tables(evaluation)
    assert {len(column) for column in tables["summary"].values()} == {6 * 3}
    assert {len(column) for column in tables["predictions"].values()} == {40}
    assert tables["predictions"].keys() == tables["labels"].keys() == {"id", *evaluation.class_names}
    written = rows(tmp_path / "report" / "per_class.csv")
    assert list(tables["per_class"]) == list(written[0])
    assert tables["per_class"]["class"] == [row["class"] for row in written]
    first = {key: column[1] for key, column in tables["summary"].items()}
    assert (first["method"], first["group"]) == ("PsPG", "seen")
    assert first["macro_auc_low"] <= first["macro_auc"] <= first["macro_auc_high"]
    expected = document["results"]["PsPG"]["unseen"]["macro_auc"]
    assert evaluation.method.metrics["unseen"].macro_auc == expected
    printed = capsys.readouterr().out
    assert re.search(rf"^ unseen: PsPG +{expected:.3f} \[", printed, re.MULTILINE)
    lowest = min((row for row in evaluation.main.per_class if row.auc == row.auc), key=lambda row: row.auc)
    heading, first = printed[printed.index(" class, lowest AUC first") :].splitlines()[:2]
    assert heading.split()[-3:] == ["AUC", "AP", "positives"]
    assert first.startswith(f" {lowest.name} ")
    assert f"{lowest.auc:.3f}" in first


def test_bank_makes_scores_independent_of_the_batch(
    model_folder: Callable[..., Path], phantoms: Path, tmp_path: Path
) -> None:
    # Random weights follow their context; those of a run of six steps hardly do, in some versions of torch.
    checkpoint, scores = str(model_folder()), {}
    for context, batch_size in (("bank", 40), ("bank", 7), ("batch", 40), ("batch", 7)):
        config = PredictConfig(
            checkpoint=checkpoint,
            input=str(phantoms / "test.jsonl"),
            output=str(tmp_path / "scores.csv"),
            overwrite=True,
            context=context,  # type: ignore[arg-type]
            batch_size=batch_size,
            workers=0,
        )
        scores[context, batch_size] = predict(config).probabilities
    np.testing.assert_allclose(scores["bank", 40], scores["bank", 7], atol=1e-6)
    assert np.abs(scores["batch", 40] - scores["batch", 7]).max() > 1e-6


def test_predict_on_a_folder_with_new_classes_and_a_bad_file(
    runs: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    films = tmp_path / "films"
    films.mkdir()
    for path in sorted((phantoms / "images").glob("test-*.png"))[:3]:
        shutil.copy(path, films)
    (films / "=cmd.png").write_bytes(b"not a picture")
    (films / "notes.txt").write_text("no image")
    output = tmp_path / "scores.csv"
    arguments = ["predict", "--checkpoint", str(runs / "two"), "--input", str(films), "--output", str(output)]
    assert main([*arguments, "--class_names", "[gallstone, =1+1]", "--workers", "0"]) == 0
    assert list(rows(output)[0]) == ["id", "gallstone", "'=1+1"]
    assert len(rows(output)) == 3
    error = capsys.readouterr().err
    assert "1 unreadable images were left out" in error
    assert "=cmd.png" in error
    assert main([*arguments, "--overwrite", "true", "--on_bad_image", "error", "--workers", "0"]) == 2
    assert "=cmd.png" in capsys.readouterr().err


def test_exports_score_like_the_run(runs: Path, phantoms: Path, tmp_path: Path) -> None:
    export = ["export-checkpoint", "--checkpoint", str(runs / "two"), "--output"]
    assert main([*export, str(tmp_path / "folder")]) == 0
    assert main([*export, str(tmp_path / "published"), "--layout", "published"]) == 0
    weights = tmp_path / "published" / "model.safetensors"
    imported = ["import-checkpoint", "--source", str(weights), "--class_names", str(phantoms / "seen.txt")]
    assert main([*imported, "--output", str(tmp_path / "imported")]) == 0
    tables = []
    for checkpoint in (runs / "two", tmp_path / "folder", tmp_path / "imported"):
        output = tmp_path / f"{checkpoint.name}.csv"
        arguments = ["--input", str(phantoms / "test.jsonl"), "--output", str(output), "--context", "batch"]
        assert main(["predict", "--checkpoint", str(checkpoint), *arguments, "--workers", "0"]) == 0
        tables.append(values(output))
    np.testing.assert_allclose(tables[1], tables[0], atol=2e-6)
    np.testing.assert_allclose(tables[2], tables[0], atol=2e-6)


def test_results_that_are_there_are_replaced_only_on_request(
    runs: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rule: no command replaces what an earlier one wrote, and none says so later than before its work."""
    manifest, checkpoint = str(phantoms / "test.jsonl"), ["--checkpoint", str(runs / "two"), "--workers", "0"]
    folder = tmp_path / "out"
    folder.mkdir()
    report = ["evaluate", *checkpoint, "--manifest", manifest, "--evaluation.bootstrap", "0", "--baselines", "false"]
    written = {
        "scores.csv": ["predict", *checkpoint, "--input", manifest, "--output", str(folder / "scores.csv")],
        "bad.csv": ["prepare", "check", "--manifest", manifest, "--output", str(folder / "bad.csv")],
        "predictions.csv": [*report, "--output", str(folder)],
    }
    for name, arguments in written.items():
        (folder / name).write_text("mine")
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert f"error: output: {folder / name} is there already; " in error
        assert error.count("\n") == 1
        assert (folder / name).read_text() == "mine"
    assert {path.name for path in folder.iterdir()} == written.keys()
    for name, arguments in written.items():
        assert main([*arguments, "--overwrite", "true"]) == 0
        assert (folder / name).read_text() != "mine"
    assert {path.name for path in folder.iterdir()} == {*REPORT, *written}


@pytest.fixture
def broken(runs: Path, tmp_path: Path) -> Path:
    """A copy of the phase-2 run to damage."""
    return Path(shutil.copytree(runs / "two", tmp_path / "broken"))


def damage(run: Path, how: str) -> None:
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None
    weights = checkpoint / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "missing key":
        tensors = load_tensors(weights)
        del tensors["logit_scale"]
        write_tensors(weights, {**tensors, "surprise": tensors["channel_attention.conv.weight"].clone()})
        seal(checkpoint)
    elif how == "no model.json":
        (run / "model.json").unlink()
    elif how == "not JSON":
        (run / "model.json").write_text("{")
    elif how == "no towers":
        (run / "clip.safetensors").unlink()
    elif how == "dangling last":
        (run / "checkpoints" / "last").write_text("step-99999999\n")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "model.safetensors: not a readable safetensors file"),
        ("missing key", "missing: logit_scale; unexpected: surprise"),
        ("no model.json", "it has no model.json"),
        ("not JSON", "model.json: not readable as JSON"),
        ("no towers", "clip.safetensors: no such file"),
        ("dangling last", "checkpoints/last: names no checkpoint folder"),
    ],
)
def test_unusable_models_are_one_line(
    broken: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, message: str
) -> None:
    damage(broken, how)
    arguments = [
        "--checkpoint",
        str(broken),
        "--input",
        str(phantoms / "test.jsonl"),
        "--output",
        str(tmp_path / "x.csv"),
    ]
    assert main(["predict", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["evaluate", "--evaluation.batch_size", "-3"], "evaluation.batch_size"),
        (["evaluate", "--evaluation.bootstrap", "-1"], "evaluation.bootstrap"),
        (["evaluate", "--evaluation.seed", "-1"], "evaluation.seed"),
        (["evaluate", "--workers", "-1"], "workers"),
        (["predict", "--batch_size", "0"], "batch_size"),
        (["predict", "--workers", "-1"], "workers"),
    ],
)
def test_impossible_numbers_name_the_key(
    runs: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], key: str
) -> None:
    source = "--manifest" if arguments[0] == "evaluate" else "--input"
    paths = ["--checkpoint", str(runs / "two"), source, str(phantoms / "test.jsonl"), "--output", str(tmp_path / "out")]
    assert main([*arguments, *paths]) == 2
    assert f"error: {key}: must" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "predict", "phantom", "import-checkpoint", "export-checkpoint"]
)
def test_output_that_cannot_be_written_is_one_line(
    runs: Path, phantoms: Path, settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "file").write_text("")
    arguments = {
        "train": settings("prompt"),
        "evaluate": ["evaluate", "--checkpoint", str(runs / "two"), "--manifest", str(phantoms / "test.jsonl")],
        "predict": ["predict", "--checkpoint", str(runs / "two"), "--input", str(phantoms / "test.jsonl")],
        "phantom": ["phantom"],
        "import-checkpoint": ["import-checkpoint", "--source", "x.pth", "--class_names", "[a]"],
        "export-checkpoint": ["export-checkpoint", "--checkpoint", str(runs / "two")],
    }[command]
    assert main([*arguments, "--output", str(tmp_path / "file" / "below")]) == 2
    error = capsys.readouterr().err
    assert "error: output: " in error
    assert error.count("\n") == 1


def resume(settings, runs: Path, phantoms: Path, run: Path) -> list[str]:
    """Arguments that continue a copy of the run `two`."""
    return [
        *settings("prompt"),
        *("--output", str(run), "--optim.epochs", "1", "--resume", "latest"),
        *("--data.class_names", str(phantoms / "seen.txt"), "--model.pretrained", str(runs / "one")),
        *("--data.augment", "false", "--data.flip", "0", "--data.cache_features", "true"),
    ]


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("how", ["emptied", "no moments", "other shape"])
def test_resume_refuses_an_optimizer_state_that_does_not_fit(
    broken: Path, runs: Path, phantoms: Path, settings, capsys: pytest.CaptureFixture[str], how: str, stage: int
) -> None:
    checkpoint = last_checkpoint(broken)
    assert checkpoint is not None
    file = checkpoint / "optimizer.safetensors"
    tensors = load_tensors(file)
    if how == "emptied":
        tensors = {}
    elif how == "no moments":
        tensors = {key: value for key, value in tensors.items() if not key.endswith("/exp_avg")}
    else:
        tensors["logit_scale/exp_avg"] = tensors["logit_scale/exp_avg"].expand(7).clone()
    write_tensors(file, tensors)
    seal(checkpoint)
    assert main([*resume(settings, runs, phantoms, broken), "--zero_stage", str(stage)]) == 2
    assert "optimizer.safetensors: missing, unexpected or of another shape: " in capsys.readouterr().err


def test_resume_refuses_other_data_and_other_settings(
    broken: Path, runs: Path, phantoms: Path, settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = resume(settings, runs, phantoms, broken)
    lines = (phantoms / "train.jsonl").read_text().splitlines()
    other = phantoms / "other.jsonl"
    other.write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    assert main([*arguments, "--data.train", str(other)]) == 2
    assert "error: data.train: " in capsys.readouterr().err
    assert main([*arguments, "--optim.lr", "2e-3"]) == 2
    assert "error: optim.lr: " in capsys.readouterr().err
    assert main(arguments) == 0


def test_a_model_folder_is_no_place_to_train(
    runs: Path, phantoms: Path, settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export-checkpoint", "--checkpoint", str(runs / "two"), "--output", str(tmp_path / "model")]) == 0
    assert main([*settings("prompt"), "--output", str(tmp_path / "model")]) == 2
    assert "holds an exported or imported model" in capsys.readouterr().err


def test_import_runs_no_code_from_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (marker.write_text, ("ran",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "scripted.pt")
    for name in ("evil.pth", "scripted.pt"):
        arguments = ["--source", str(tmp_path / name), "--class_names", "[a, b]", "--output", str(tmp_path / "out")]
        assert main(["import-checkpoint", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "weights_only" not in error
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_unreadable_validation_images_are_listed_also_from_the_cache(
    runs: Path, phantoms: Path, settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in (phantoms / "val.jsonl").read_text().splitlines()]
    lines[3]["filepath"] = "images/missing.png"
    (phantoms / "gap.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [
        word for word in resume(settings, runs, phantoms, tmp_path / "run") if word not in ("--resume", "latest")
    ]
    skipping = ["--data.val", str(phantoms / "gap.jsonl"), "--data.on_bad_image", "skip"]
    assert main([*arguments, *skipping]) == 0
    error = capsys.readouterr().err
    assert "1 unreadable images were left out" in error
    assert "missing.png" in error

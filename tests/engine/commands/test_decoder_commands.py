"""Every decoder and prompt mode through the commands: train, stop, resume, evaluate, predict, export, import."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pspg.engine.checkpoints.model_folder import load_model
from pspg.engine.checkpoints.run import last_checkpoint, load_tensors
from pspg.engine.cli import main
from pspg.engine.training.tasks import PromptTask


def scores(checkpoint: Path, phantoms: Path, output: Path, *arguments: str) -> np.ndarray:
    """Probabilities that `predict` writes, (N,C)."""
    command = ["predict", "--checkpoint", str(checkpoint), "--input", str(phantoms / "test.jsonl")]
    assert main([*command, "--output", str(output), "--workers", "0", "--overwrite", "true", *arguments]) == 0
    with output.open(newline="") as file:
        return np.array([[float(v) for k, v in row.items() if k != "id"] for row in csv.DictReader(file)])


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Interrupt training within its step number `steps` + 1."""
    loss, seen = PromptTask.loss, []

    def counted(*arguments: Any) -> Any:
        seen.append(0)
        if len(seen) > steps:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(PromptTask, "loss", counted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "prompts"),
    [("gru", "positive"), ("gru", "shared"), ("lstm", "dual"), ("transformer", "dual"), ("mlp", "shared")],
)
def test_a_run_from_training_to_scores(
    phantoms: Path,
    settings: Callable[[str], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    decoder: str,
    prompts: str,
) -> None:
    model = ["--model.decoder", decoder, "--model.prompts", prompts, "--model.drop_path", "0.5"]
    data = ["--data.class_names", str(phantoms / "seen.txt"), "--save_every", "1", "--optim.epochs", "1"]
    command = [*settings("prompt"), *model, *data, "--output"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*command, str(whole)]) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert main([*command, str(cut)]) == 130
    assert last_checkpoint(cut) is not None
    assert main([*command, str(cut), "--resume", "latest"]) == 0
    ends = [last_checkpoint(run) for run in (whole, cut)]
    one, other = (load_tensors(end / "model.safetensors") for end in ends if end is not None)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)

    head = json.loads((whole / "model.json").read_text())["head"]
    assert (head["decoder"], head["prompts"]) == (decoder, prompts)
    bank = scores(whole, phantoms, tmp_path / "bank.csv")
    np.testing.assert_allclose(scores(whole, phantoms, tmp_path / "x.csv", "--batch_size", "7"), bank, atol=1e-6)
    batch = scores(whole, phantoms, tmp_path / "x.csv", "--batch_size", "7", "--context", "batch")
    if decoder == "mlp":  # the one that does not attend to images; what is left is rounding
        np.testing.assert_allclose(batch, bank, atol=1e-6)
    else:
        assert np.abs(batch - bank).max() > 1e-7

    report = ["evaluate", "--checkpoint", str(whole), "--manifest", str(phantoms / "test.jsonl"), "--workers", "0"]
    unseen = ["--class_lists", json.dumps({"unseen": str(phantoms / "unseen.txt")}), "--baselines", "false"]
    assert main([*report, *unseen, "--output", str(tmp_path / "report"), "--evaluation.bootstrap", "5"]) == 0
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["results"].keys() == {"PsPG"}

    export = ["export-checkpoint", "--checkpoint", str(whole), "--layout", "published", "--output"]
    assert main([*export, str(tmp_path / "published")]) == 0
    weights = str(tmp_path / "published" / "model.safetensors")
    imports = ["import-checkpoint", "--source", weights, "--class_names", str(phantoms / "seen.txt"), "--output"]
    assert main([*imports, str(tmp_path / "imported")]) == 0
    assert load_model(tmp_path / "imported").model.config.decoder == decoder
    again = scores(tmp_path / "imported", phantoms, tmp_path / "x.csv", "--batch_size", "7", "--context", "batch")
    np.testing.assert_allclose(again, batch, atol=2e-6)


def test_folders_from_before_there_was_a_choice_hold_the_gru(
    phantoms: Path, settings: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([*settings("prompt"), "--optim.epochs", "1", "--output", str(run)]) == 0
    expected = scores(run, phantoms, tmp_path / "x.csv")
    description = json.loads((run / "model.json").read_text())
    for key in ("decoder", "prompts", "drop_path"):
        del description["head"][key]
    (run / "model.json").write_text(json.dumps(description))
    assert (scores(run, phantoms, tmp_path / "x.csv") == expected).all()
    description["head"]["decoder"] = "oracle"
    (run / "model.json").write_text(json.dumps(description))
    capsys.readouterr()
    assert main(["predict", "--checkpoint", str(run), "--input", str(phantoms), "--output", str(tmp_path / "y")]) == 2
    error = capsys.readouterr().err
    assert "model.json: model.decoder: 'oracle' is not one of context, gru, lstm, mlp, transformer" in error
    assert error.count("\n") == 1

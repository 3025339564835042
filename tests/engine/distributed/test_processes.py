"""Two gloo processes under every ZeRO stage; `test_global_batch.py` has the batch that ranks share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pspg.engine.checkpoints.run import last_checkpoint, load_tensors
from pspg.engine.training.telemetry import read_metrics


def finish(process) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = last_checkpoint(run)
    assert folder is not None
    return load_tensors(folder / "model.safetensors")


@pytest.fixture(scope="module")
def one_image(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training rows with their labels, all showing the same image.

    Then every rank's context is the same, and the loss of phase 2 with BCE is a mean over samples.
    """
    rows = [json.loads(line) for line in (phantoms / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["filepath"] = rows[0]["filepath"]
    path = phantoms / "one_image.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


BCE = ["--loss.classification", "bce", "--loss.classification_reduction", "mean", "--loss.pair", "none"]
LOCAL = ["--scope", "local"]


@pytest.fixture(scope="module")
def alone(one_image: Path, settings, engine_command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    same = ["--data.train", one_image, "--data.augment", "false", "--data.flip", "0", "--model.dropout", "0"]
    finish(engine_command([*settings("prompt"), *BCE, *same, "--output", run]))
    return run


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_phase_2_equals_one_process_for_a_mean_over_samples(
    tmp_path: Path, one_image: Path, alone: Path, settings, engine_command, stage: int
) -> None:
    run = tmp_path / "run"
    same = ["--data.train", one_image, "--data.augment", "false", "--data.flip", "0", "--model.dropout", "0"]
    arguments = [*settings("prompt"), *BCE, *LOCAL, *same, "--output", run, "--zero_stage", stage]
    finish(engine_command(arguments, processes=2))
    expected, got = weights(alone), weights(run)
    assert expected.keys() == got.keys()
    # AdamW moves a weight by about lr however small its gradient, so rounding can show where gradients vanish.
    moved = max((value - got[key]).abs().max().item() for key, value in expected.items())
    assert moved < 2e-5
    one, two = (read_metrics(folder / "metrics.jsonl") for folder in (alone, run))
    assert [row["loss"] for row in one if "loss" in row] == pytest.approx(
        [row["loss"] for row in two if "loss" in row], rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(("task", "stage"), [("contrastive", 1), ("prompt", 2)])
def test_run_of_one_process_goes_on_with_two(
    tmp_path: Path, settings, engine_command, killed_run, task: str, stage: int
) -> None:
    """A checkpoint does not know how many ranks wrote it, nor its ZeRO stage (test_rank_counts: all of them)."""
    run = tmp_path / "run"
    arguments = [
        *settings(task),
        "--output",
        run,
        "--optim.ema_decay",
        "0.9",
        "--save_every",
        "1",
        "--resume",
        "latest",
    ]
    killed_run(arguments, rows=3)
    done = int(json.loads((last_checkpoint(run) / "state.json").read_text())["step"])
    output = finish(engine_command([*arguments, "--zero_stage", stage], processes=2))
    assert f"resuming from {run}" in output
    assert 0 < done < 12
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row] == list(range(1, 13))


@pytest.mark.slow
def test_batch_that_does_not_split_is_one_line(tmp_path: Path, settings, engine_command) -> None:
    process = engine_command([*settings("prompt"), "--batch_size", "9", "--output", tmp_path / "run"], processes=2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    lines = [line for line in output.splitlines() if line.startswith("pspg-engine")]
    assert lines == ["pspg-engine train: error: batch_size: 9 images cannot be split over 2 processes"]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_error_that_one_rank_meets_is_said(tmp_path: Path, phantoms: Path, settings, engine_command) -> None:
    """One unreadable image is in the share of one rank only, whichever it is."""
    rows = [json.loads(line) for line in (phantoms / "train.jsonl").read_text().splitlines()]
    rows[5]["filepath"] = "images/broken.png"
    (phantoms / "images" / "broken.png").write_bytes(b"")
    (phantoms / "broken.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--data.train", phantoms / "broken.jsonl", "--data.mean", "0.5", "--data.std", "0.25"]
    process = engine_command([*settings("contrastive"), *arguments, "--output", tmp_path / "run"], processes=2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    (line,) = [line for line in output.splitlines() if line.startswith("pspg-engine")]
    assert line.startswith("pspg-engine train: error: rank ")
    assert "broken.png" in line

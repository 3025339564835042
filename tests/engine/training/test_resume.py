"""Runs that are killed at any moment end where undisturbed runs end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pspg.engine.checkpoints.run import best_checkpoint, last_checkpoint, load_tensors, read_json
from pspg.engine.utils.metrics_log import read_metrics

# Everything that draws random numbers or carries state over batches.
STATEFUL = [
    "--data.workers", "2", "--data.augment", "true", "--data.flip", "0.5", "--model.dropout", "0.3",
    "--optim.accumulate", "2", "--optim.ema_decay", "0.9", "--optim.clip_norm", "1.0", "--save_every", "1",
]  # fmt: skip


def finish(process) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def rows_of(folder: Path) -> list[dict[str, object]]:
    clock = {"images_per_s", "loader_wait", "peak_bytes"}
    return [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["contrastive", "prompt"])
def test_sigkill_and_resume(tmp_path: Path, settings, engine_command, killed_run, task: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = [*settings(task), *STATEFUL]
    finish(engine_command([*arguments, "--output", whole]))
    resume = [*arguments, "--output", cut, "--resume", "latest"]
    for rows in (1, 2, 6):
        killed_run(resume, rows)
    output = finish(engine_command(resume))
    assert "resuming from" in output
    assert rows_of(cut) == rows_of(whole)
    for checkpoint in (last_checkpoint, best_checkpoint):
        a, b = checkpoint(whole), checkpoint(cut)
        assert a is not None
        assert b is not None
        assert read_json(a / "state.json")["step"] == read_json(b / "state.json")["step"]
        for name in ("model", "ema", "optimizer"):
            expected, got = load_tensors(a / f"{name}.safetensors"), load_tensors(b / f"{name}.safetensors")
            assert expected.keys() == got.keys()
            for key, value in expected.items():
                assert torch.equal(value, got[key]), (name, key)


@pytest.mark.slow
def test_killed_before_the_first_checkpoint_starts_fresh(tmp_path: Path, settings, engine_command, killed_run) -> None:
    resume = [*settings("prompt"), "--output", tmp_path / "run", "--resume", "latest"]
    killed_run(resume, rows=1)
    assert (tmp_path / "run" / "config.yaml").exists()
    assert last_checkpoint(tmp_path / "run") is None
    assert "starting fresh" in finish(engine_command(resume))

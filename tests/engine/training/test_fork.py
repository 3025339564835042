"""A fork goes on from its parent's checkpoint under the settings that may differ, and says where it comes from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from pspg.engine.checkpoints.run import best_checkpoint, last_checkpoint, load_tensors, read_json
from pspg.engine.cli import main
from pspg.engine.training.config import TrainConfig
from pspg.engine.training.fingerprint import FORK_CHANGES, FORKABLE, resume_fingerprint
from pspg.engine.utils.metrics_log import read_metrics

Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def arguments(settings: Callable[[str], list[str]]) -> Arguments:
    """Function (output, …, **more) → arguments of a training on cached features at a constant learning rate."""

    def make(output: Path, *more: object, task: str = "prompt") -> list[str]:
        plain = ["--optim.schedule", "constant", "--data.augment", "false", "--data.flip", "0"]
        cached = ["--data.cache_features", "true"] if task == "prompt" else []
        return [*settings(task), *plain, *cached, "--output", str(output), *map(str, more)]

    return make


@pytest.fixture(scope="module")
def parent(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs."""
    folder = tmp_path_factory.mktemp("fork") / "a"
    assert main(arguments(folder)) == 0
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(run: Path, name: str = "model") -> dict[str, torch.Tensor]:
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None
    return load_tensors(checkpoint / f"{name}.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["prompt", "contrastive"])
def test_more_epochs_are_those_of_a_longer_run(arguments: Arguments, tmp_path: Path, task: str) -> None:
    short, whole, fork = (tmp_path / name for name in ("short", "whole", "fork"))
    assert main(arguments(short, task=task)) == 0
    assert main(arguments(whole, "--optim.epochs", 3, task=task)) == 0
    before = contents(short)
    assert main(arguments(fork, "--optim.epochs", 3, "--fork", short, task=task)) == 0
    assert contents(short) == before
    assert same(weights(fork), weights(whole))
    assert same(weights(fork, "optimizer"), weights(whole, "optimizer"))
    losses = [[row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row] for run in (whole, fork)]
    assert losses[0] == losses[1]
    best = [best_checkpoint(run) for run in (whole, fork)]
    assert best[0] is not None
    assert best[1] is not None
    assert best[0].name == best[1].name


def test_a_fork_records_its_parent_and_what_changed_and_can_be_resumed(
    arguments: Arguments, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fork = tmp_path / "b"
    changed = ["--optim.lr", "3e-4", "--optim.epochs", 4, "--loss.gamma_negative", 3, "--log_every", 2]
    assert main(arguments(fork, *changed, "--fork", parent)) == 0
    assert "a fork of " in capsys.readouterr().err
    state = read_json(parent / "checkpoints/step-00000012/state.json")
    assert read_json(fork / "fork.json") == {
        "parent": "a",
        "step": 12,
        "sha256": state["sha256"],
        "changed": {"loss.gamma_negative": [2.0, 3.0], "optim.lr": [1e-3, 3e-4], "optim.epochs": [2, 4]},
    }
    assert yaml.safe_load((fork / "config.yaml").read_text())["optim"]["lr"] == 3e-4
    rows = [row for row in read_metrics(fork / "metrics.jsonl") if "lr" in row]
    assert {row["lr"] for row in rows if row["step"] > 12} == {3e-4}
    assert [row["step"] for row in rows] == [*range(1, 13), 14, 16, 18, 20, 22, 24]
    # From now on it is a run like any other.
    assert main(arguments(fork, *changed, "--optim.epochs", 5, "--resume", "latest")) == 2
    assert "error: optim.epochs: " in capsys.readouterr().err
    assert main(arguments(fork, *changed, "--fork", parent, "--resume", "latest")) == 0
    assert "resuming from" in capsys.readouterr().err
    assert main(arguments(fork, *changed, "--fork", fork.with_name("c"), "--resume", "latest")) == 2
    assert "no such file or folder" in capsys.readouterr().err
    grandchild = tmp_path / "c"
    assert main(arguments(grandchild, *changed, "--optim.epochs", 5, "--fork", fork)) == 0
    assert read_json(grandchild / "fork.json")["parent"] == "b"
    assert main(arguments(grandchild, *changed, "--optim.epochs", 5, "--fork", parent, "--resume", "latest")) == 2
    assert f"fork: {grandchild} is a fork of b, not of a" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.dropout", "0.3"], f"model.dropout: .* a fork may change {re.escape(FORK_CHANGES)}"),
        (["--batch_size", "24"], "batch_size: "),
        (["--optim.epochs", "2"], "optim.epochs: .* has trained 2 epochs already; ask for more"),
        (["--data.class_names", "SEEN"], "data.train: .* a fork may change"),
        (["--fork", "NONE"], "fork: .* is not the folder of a run, it has no checkpoints; model.pretrained_head"),
        (["--fork", "OUTPUT"], "fork: .* is the output itself"),
    ],
)
def test_what_cannot_be_forked_is_one_line_and_writes_nothing(
    arguments: Arguments,
    phantoms: Path,
    parent: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    output = tmp_path / "b"
    (tmp_path / "none").mkdir()
    places = {"SEEN": phantoms / "seen.txt", "NONE": tmp_path / "none", "OUTPUT": parent}
    words = arguments(output, "--optim.epochs", 3, "--fork", parent, *(places.get(word, word) for word in more))
    if "OUTPUT" in more:
        words += ["--output", str(parent)]
    assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(f"error: {message}", error), error
    assert not output.exists()


def test_a_dry_run_forks_nothing(
    arguments: Arguments, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(tmp_path / "b", "--optim.epochs", 3, "--fork", parent, "--dry_run", "true")
    assert main(words) == 0
    assert "dry run: nothing was started" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_damage_of_the_parent_is_told_and_its_newest_good_checkpoint_taken(
    arguments: Arguments, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, fork = tmp_path / "copy", tmp_path / "b"
    shutil.copytree(parent, copy)
    newest = last_checkpoint(copy)
    assert newest is not None
    (newest / "optimizer.safetensors").write_bytes(b"damaged")
    assert main(arguments(fork, "--optim.epochs", 3, "--fork", copy)) == 3
    assert "the newest good checkpoint is" in capsys.readouterr().err
    assert read_json(fork / "fork.json")["step"] == 6
    assert json.loads((last_checkpoint(fork) / "state.json").read_text())["step"] == 18  # type: ignore[operator]


def test_patience_counts_from_the_fork(arguments: Arguments, parent: Path, tmp_path: Path) -> None:
    """However long ago the parent's best epoch was, the fork has its own epochs to get better."""
    copy = tmp_path / "copy"
    shutil.copytree(parent, copy)
    assert main(arguments(tmp_path / "b", "--optim.epochs", 9, "--optim.patience", 1, "--fork", copy)) == 0
    state = json.loads((last_checkpoint(tmp_path / "b") / "state.json").read_text())  # type: ignore[operator]
    assert state["epoch"] >= 3


def test_the_stated_list_is_the_list() -> None:
    """The words of messages and --help name what may change, and every one is a setting of a run's fingerprint."""
    flat = resume_fingerprint(TrainConfig(), {})
    assert FORKABLE - {"optim.patience"} <= flat.keys()
    kept = {key for key in flat if key.startswith("optim.")} - FORKABLE
    assert kept == {"optim.name", "optim.accumulate", "optim.ema_decay"}
    groups = {key if key.startswith(("data.", "seed")) else f"{key.split('.')[0]}.*" for key in FORKABLE}
    assert groups == set(FORK_CHANGES.partition(" but ")[0].split(", "))

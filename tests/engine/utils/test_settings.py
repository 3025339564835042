"""Settings in Python are read and refused as on the command line, in one line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pspg.engine.cli import parse
from pspg.engine.commands.study.config import LeaveOutConfig
from pspg.engine.config import DataConfig, check_values
from pspg.engine.training.config import OptimConfig, TrainConfig
from pspg.engine.utils.errors import UserError
from pspg.engine.utils.settings import as_settings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(
        "model: {decoder: mlp}\noptim: {lr: 0.1, epochs: 3}\ndata: {class_names: [no, 1], train: a.jsonl}\n"
    )
    return path


def test_every_way_gives_the_settings_of_the_command_line(file: Path) -> None:
    words = ["train", str(file), "--optim.epochs", "7", "--data.val", "b.jsonl"]
    expected = parse(words)[1]
    assert expected.data.class_names == ["no", "1"]
    groups = {"optim": {"epochs": 7}, "data": {"val": Path("b.jsonl")}}
    assert as_settings(TrainConfig, file, **groups) == expected
    assert as_settings(TrainConfig, str(file), optim=groups["optim"], **{"data.val": "b.jsonl"}) == expected
    flat = {"model.decoder": "mlp", "optim.lr": 0.1, "data": DataConfig(class_names=["no", "1"], train="a.jsonl")}
    assert as_settings(TrainConfig, flat, optim={"epochs": 7}, **{"data.val": "b.jsonl"}) == expected
    assert as_settings(TrainConfig, expected) is expected
    assert as_settings(TrainConfig, expected, seed=3).seed == 3
    assert type(as_settings(TrainConfig, optim=OptimConfig(epochs=2)).optim.epochs) is int
    assert as_settings(TrainConfig) == TrainConfig()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optim.lr": -1}, "optim.lr: must be > 0, got -1"),
        ({"lr": 1}, "there is no setting lr; did you mean optim.lr"),
        ({"optim": {"learning": 1}}, "there is no setting optim.learning"),
        ({"model.decoder": "grru"}, "model.decoder: 'grru' is not one of context, gru"),
        ({"optim.epochs": None}, "optim.epochs: must not be null"),
        ({"model": 3}, "model: is a group of settings, got 3"),
        ("nowhere.yaml", "config: nowhere.yaml: no such file"),
        (3, "config: must be settings, a dictionary or the path of a YAML file, got int"),
    ],
)
def test_mistakes_are_one_line(given: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        as_settings(TrainConfig, given)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optim.lr": math.inf}, "optim.lr: must be a finite number, got inf"),
        ({"optim.lr": "1e400"}, "optim.lr: must be a finite number, got inf"),
        ({"data": {"std": math.inf}}, "data.std: must be a finite number, got inf"),
        ({"optim.lr": math.nan}, "optim.lr: must be > 0, got nan"),
        ({"output": "runs/a\0b"}, "output: holds a NUL character; take it out"),
        ({"data": {"class_names": ["a", "b\0"]}}, "data.class_names: holds a NUL character; take it out"),
        ({"batch_size": 10**30}, "batch_size: must be a number below 2^63, got one of 100 bits"),
        (TrainConfig(optim=OptimConfig(weight_decay=math.inf)), "optim.weight_decay: must be a finite number, got inf"),
    ],
)
def test_what_no_setting_can_be_is_refused(given: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_values(as_settings(TrainConfig, given))  # what is made in Python no parser sees
    assert str(caught.value) == message


def test_they_are_refused_within_lists_and_dictionaries() -> None:
    with pytest.raises(UserError, match=r"^weights: must be a finite number, got inf$"):
        as_settings(LeaveOutConfig, weights=[1.0, math.inf])
    with pytest.raises(UserError, match=r"^settings\.optim\.lr: must be a finite number, got nan$"):
        as_settings(LeaveOutConfig, settings={"optim.lr": math.nan})

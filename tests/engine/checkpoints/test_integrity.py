"""Flipped bits, cut files and lost pointers in checkpoints: told, and the newest good one is used."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from pspg.engine.checkpoints.integrity import check_files, read_state
from pspg.engine.checkpoints.run import best_checkpoint, good_checkpoint, last_checkpoint, save_checkpoint
from pspg.engine.utils.errors import UserError

NAMES = ("model", "ema", "optimizer")


def save(run: Path, step: int, best_step: int | None = None) -> None:
    tensors = {name: {"w": torch.full((64,), float(step))} for name in NAMES}
    save_checkpoint(run, step, tensors, {"step": step, "best_step": best_step, "epoch": 0, "contract": {}})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        save(tmp_path, step)
    return tmp_path


def chosen(run: Path) -> str:
    found = good_checkpoint(run)
    assert found is not None
    return found[0].name[-1]


def flip(file: Path, place: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


def test_two_are_kept(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert sorted(path.name[-1] for path in (run / "checkpoints").glob("step-*")) == ["2", "3"]
    assert chosen(run) == "3"
    assert not caplog.records


@pytest.mark.parametrize("name", [*NAMES, "state"])
def test_every_flipped_bit_is_told_and_the_good_one_used(
    run: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    file = run / "checkpoints" / "step-00000003" / ("state.json" if name == "state" else f"{name}.safetensors")
    whole = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        place, bit = (
            int(torch.randint(len(whole), (), generator=generator)),
            int(torch.randint(8, (), generator=generator)),
        )
        flip(file, place, bit)
        caplog.clear()
        if name == "state" and json_value(file) == json.loads(whole):
            assert chosen(run) == "3"  # white space
        else:
            assert chosen(run) == "2", (place, bit)
            (told,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
            assert str(file) in told
            assert "step-00000002" in told
        file.write_bytes(whole)
    assert chosen(run) == "3"


def json_value(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except ValueError:
        return None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_cut_files_are_told(run: Path, caplog: pytest.LogCaptureFixture, name: str, length: int) -> None:
    file = run / "checkpoints" / "step-00000003" / f"{name}.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    assert chosen(run) == "2"
    assert f"{file}: not a readable safetensors file" in caplog.text


def test_a_damaged_best_falls_back(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(run, 4, best_step=3)
    assert best_checkpoint(run) == run / "checkpoints" / "step-00000003"
    (run / "checkpoints" / "step-00000003" / "model.safetensors").unlink()
    assert best_checkpoint(run) == run / "checkpoints" / "step-00000004"
    assert "no such file" in caplog.text


def test_nothing_whole_is_an_error(run: Path) -> None:
    for file in (run / "checkpoints").glob("*/model.safetensors"):
        flip(file, -1, 3)
    with pytest.raises(UserError, match=r"model\.safetensors: wrong checksum.*no other checkpoint"):
        good_checkpoint(run)


def test_a_lost_pointer(run: Path) -> None:
    (run / "checkpoints" / "last").unlink()
    assert last_checkpoint(run) == run / "checkpoints" / "step-00000003"
    assert chosen(run) == "3"
    (run / "checkpoints" / "step-00000003").rename(run / "checkpoints" / "step-00000099")
    save(run, 4)
    assert {path.name[-2:] for path in (run / "checkpoints").glob("step-*")} == {"02", "04", "99"} - {"02"} | {"02"}


@pytest.mark.parametrize(
    "change",
    [
        {"step": "12"},
        {"step": -1},
        {"step": 10**18},
        {"step": 1.5},
        {"step": True},
        {"step": None},
        {"best_step": "1"},
        {"epoch": -5},
        {"epoch": []},
        {"contract": 2},
        {"scaler": "x"},
        {"files": []},
        {"files": {"model.safetensors": 3}},
        {"best_score": "high"},
        {"step": 2},
    ],
)
def test_a_state_of_other_values_is_refused(run: Path, change: dict[str, Any]) -> None:
    folder = run / "checkpoints" / "step-00000003"
    document = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**document, **change}))
    with pytest.raises(UserError, match=r"state\.json: ") as caught:
        read_state(folder)
    assert "\n" not in str(caught.value)
    assert chosen(run) == "2"


def test_a_state_names_no_file_elsewhere(run: Path) -> None:
    with pytest.raises(UserError, match=r"names '\.\./x' as one of its files"):
        check_files(run, {"../x": ""})

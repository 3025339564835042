"""Checkpoints survive a kill at any point."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pspg.engine.checkpoints import run as checkpoint
from pspg.engine.checkpoints.run import best_checkpoint, last_checkpoint, load_tensors, read_json, save_checkpoint
from pspg.engine.utils.errors import UserError


def save(run: Path, step: int, best_step: int | None) -> None:
    tensors = {"model": {"w": torch.full((2,), float(step))}}
    save_checkpoint(run, step, tensors, {"step": step, "best_step": best_step})


def step_of(folder: Path | None) -> float:
    assert folder is not None
    return load_tensors(folder / "model.safetensors")["w"][0].item()


def test_last_and_best_are_kept_and_nothing_else(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3), (5, 3)):
        save(tmp_path, step, best)
    assert step_of(last_checkpoint(tmp_path)) == 5
    assert step_of(best_checkpoint(tmp_path)) == 3
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    assert folders == ["step-00000003", "step-00000005"]


def test_without_a_score_the_newest_is_best(tmp_path: Path) -> None:
    save(tmp_path, 1, None)
    save(tmp_path, 2, None)
    assert step_of(best_checkpoint(tmp_path)) == 2


OPERATIONS = 10
"""file operations of a save that replaces both last and best"""


class Killed(BaseException):
    pass


@pytest.mark.parametrize("survives", range(OPERATIONS + 1))
def test_killed_at_any_file_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survives: int) -> None:
    """Let `survives` file operations of a save happen, then die: the run still names complete checkpoints."""
    save(tmp_path, 1, 1)
    save(tmp_path, 2, 1)
    left = survives

    def dying(function):
        def call(*args, **kwargs):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for module, name in ((os, "replace"), (os, "rename"), (checkpoint.shutil, "rmtree"), (os, "fsync")):
            patch.setattr(module, name, dying(getattr(module, name)))
        try:
            save(tmp_path, 3, 3)
        except Killed:
            assert survives < OPERATIONS
        else:
            assert survives == OPERATIONS
    last, best = last_checkpoint(tmp_path), best_checkpoint(tmp_path)
    assert last is not None
    assert step_of(last) == read_json(last / "state.json")["step"] in (2, 3)
    assert step_of(best) == read_json(last / "state.json")["best_step"]
    save(tmp_path, 3, 3)
    save(tmp_path, 4, 3)
    assert step_of(last_checkpoint(tmp_path)) == 4
    assert step_of(best_checkpoint(tmp_path)) == 3


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}", b"not tensors at all"])
def test_damaged_tensors_are_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    if content.endswith(b"{}"):
        content = file.read_bytes()[:-1]
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable safetensors file") as caught:
        load_tensors(file)
    assert "\n" not in str(caught.value)


def test_damaged_json_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json: not readable as JSON"):
        read_json(tmp_path / "state.json")
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "other.json")

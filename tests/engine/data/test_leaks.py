"""Images and patients that are in the training and in the held-out manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pspg.engine.data.leaks import check_apart
from pspg.engine.data.manifest import Manifest, load_manifest
from pspg.engine.utils.errors import UserError

Load = Callable[..., Manifest]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(name: str, *rows: dict[str, Any]) -> Manifest:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_manifest(path, need="image")

    return load


@pytest.mark.parametrize("spelled", ["a.png", "./a.png", "s//../a.png", ".\\a.png", "link.png", "folder/a.png"])
def test_a_file_in_both_is_refused_with_both_lines(load: Load, tmp_path: Path, spelled: str) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "link.png").symlink_to("a.png")
    (tmp_path / "folder").symlink_to(tmp_path)
    training = load("train.jsonl", {"id": "0", "filepath": "b.png"}, {"id": "1", "filepath": "a.png"})
    if ".." in spelled:
        with pytest.raises(UserError, match=r"'\.\.'"):
            load("val.jsonl", {"id": "x", "filepath": spelled})
        return
    held_out = load("val.jsonl", {"id": "x", "filepath": spelled}, {"id": "y", "filepath": "c.png"})
    with pytest.raises(UserError) as caught:
        check_apart(training, held_out)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/val.jsonl:1 and {tmp_path}/train.jsonl:2: the same image, 'a.png'; 1 images")
    assert "\n" not in message


def test_a_patient_in_both_is_told(load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = load("train.jsonl", {"id": "0", "filepath": "b.png", "patient_id": 7}, {"id": "1", "filepath": "a.png"})
    others = [{"id": "x", "filepath": "x.png"}, {"id": "y", "filepath": "y.png", "patient_id": 8}]
    check_apart(training, load("val.jsonl", *others))
    assert not caplog.messages
    check_apart(training, load("val.jsonl", *others, {"id": "z", "filepath": "z.png", "patient_id": "7"}))
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}/val.jsonl:3 and {tmp_path}/train.jsonl:1: the same patient; 1 patients")


def test_one_manifest_as_both_is_only_told(load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = load("train.jsonl", {"id": "0", "filepath": "b.png", "patient_id": 7})
    check_apart(training, training)
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}/train.jsonl: is both data.train and data.val")

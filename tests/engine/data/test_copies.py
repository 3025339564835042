"""Files with the same bytes under several names: which are found, and what is said."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pspg.engine.data.copies import START, find_copies, tell_copies
from pspg.engine.data.manifest import load_manifest


@pytest.fixture
def found(tmp_path: Path) -> Any:
    def found(**manifests: list[str]) -> list[tuple[str, ...]]:
        """Pairs of `manifest:line name` of the first file and the copy."""
        loaded = []
        for name, files in manifests.items():
            path = tmp_path / f"{name}.jsonl"
            rows = [{"id": f"{name} {number}", "filepath": file} for number, file in enumerate(files)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            loaded.append(load_manifest(path, need="image"))
        copies = find_copies(loaded)
        tell_copies(copies)
        return [
            tuple(f"{place.manifest.stem}:{place.sample.line} {place.sample.path.name}" for place in pair)
            for pair in copies
        ]

    return found


def test_only_files_that_agree_in_every_byte_are_copies(
    tmp_path: Path, found: Any, caplog: pytest.LogCaptureFixture
) -> None:
    long = os.urandom(START + 100)
    files = {
        "a": b"film",
        "b": b"mlif",  # of the same size
        "copy": b"film",
        "again": b"film",
        "long": long,
        "end": long[:-1] + bytes([long[-1] ^ 1]),  # of the same start
        "long copy": long,
        "empty": b"",
        "also empty": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe 2")
    train = ["a", "b", "long", "end", "empty", "also empty", "gone", "folder", "pipe", "pipe 2", "again"]
    assert found(train=train, val=["copy", "a", "link", "long copy"]) == [
        ("train:1 a", "train:11 again"),
        ("train:1 a", "val:1 copy"),
        ("train:3 long", "val:4 long copy"),
    ]
    within, between = caplog.messages[-2:]
    assert within == (
        f"{tmp_path}/train.jsonl:11 and {tmp_path}/train.jsonl:1: the same image, 'again' has the bytes of 'a'; "
        "1 such copies count twice"
    )
    assert between.startswith(f"{tmp_path}/val.jsonl:1 and {tmp_path}/train.jsonl:1: the same image, 'copy' has the ")
    assert "2 such copies are in both manifests" in between


def test_nothing_is_said_where_there_are_none(tmp_path: Path, found: Any, caplog: pytest.LogCaptureFixture) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    assert found(train=["a"], val=["b", "a"]) == []
    assert not caplog.messages

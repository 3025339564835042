"""Exports appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pspg.engine.cli import main
from pspg.engine.commands import convert

LAYOUTS = ["pspg-engine", "published", "classifier"]
MakeFolder = Callable[..., Path]


def export(source: Path, output: Path, layout: str) -> int:
    return main(["export-checkpoint", "--checkpoint", str(source), "--output", str(output), "--layout", layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_folder_is_filled_and_a_full_one_refused(
    model_folder: MakeFolder, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = model_folder(), tmp_path / "exported"
    output.mkdir()
    assert export(source, output, layout) == 0
    files = {file.name: file.read_bytes() for file in output.iterdir()}
    assert files
    assert export(source, output, layout) == 2
    assert f"output: {output} is not empty; name a new folder" in capsys.readouterr().err
    assert files == {file.name: file.read_bytes() for file in output.iterdir()}


@pytest.mark.parametrize("layout", ["pspg-engine", "published"])
def test_what_is_interrupted_leaves_nothing_and_can_be_repeated(
    model_folder: MakeFolder, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = model_folder(), tmp_path / "exported"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(convert, "write_json" if layout == "published" else "write_model", interrupt)
        assert export(source, output, layout) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name]
    assert export(source, output, layout) == 0

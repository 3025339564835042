"""Exports appear whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pspg.engine.checkpoints.published import published_metadata, published_state
from pspg.engine.cli import main
from pspg.engine.commands import convert
from tests.engine.checkpoints.test_published import make

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


@pytest.mark.parametrize(
    ("given", "mean", "std", "assumed"),
    [
        ([], 0.5306, 0.2327, "mean 0.5306 and std 0.2327"),
        (["--mean", "0.4"], 0.4, 0.2327, "std 0.2327"),
        (["--std", "0.3"], 0.5306, 0.3, "mean 0.5306"),
        (["--mean", "0.4", "--std", "0.3"], 0.4, 0.3, None),
    ],
)
def test_the_authors_checkpoints_have_the_authors_pixels(
    names: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    mean: float,
    std: float,
    assumed: str | None,
) -> None:
    """Their layout says nothing of pixels; what is assumed is told, what is given is used."""
    torch.save({"state_dict": published_state(make(names))}, tmp_path / "best.pth")
    (tmp_path / "classes.txt").write_text("\n".join(names))
    arguments = ["--source", tmp_path / "best.pth", "--class_names", tmp_path / "classes.txt", *given]
    arguments += ["--prompt_length", 3, "--decoder_heads", 2, "--output", tmp_path / "imported"]
    assert main(["import-checkpoint", *map(str, arguments)]) == 0
    pixels = json.loads((tmp_path / "imported/model.json").read_text())["pixels"]
    assert (pixels["mean"], pixels["std"]) == (mean, std)
    said = capsys.readouterr().err
    assert ("does not say its pixels'" in said) == (assumed is not None)
    assert assumed is None or f"does not say its pixels' {assumed}: the authors' evaluation has these" in said


def test_a_file_of_ours_says_its_pixels(names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    model = make(names)
    metadata = published_metadata(model) | {"pixels": json.dumps({"mean": 0.1, "std": 0.9})}
    save_file(published_state(model), tmp_path / "best.safetensors", metadata)
    (tmp_path / "classes.txt").write_text("\n".join(names))
    arguments = ["--source", tmp_path / "best.safetensors", "--class_names", tmp_path / "classes.txt"]
    assert main(["import-checkpoint", *map(str, [*arguments, "--output", tmp_path / "imported"])]) == 0
    pixels = json.loads((tmp_path / "imported/model.json").read_text())["pixels"]
    assert (pixels["mean"], pixels["std"]) == (0.1, 0.9)
    assert "does not say" not in capsys.readouterr().err

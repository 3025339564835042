"""Maps: what they say, where they say it, and which pictures `predict` writes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file
from torch.nn.functional import normalize

from pspg.engine.cli import main
from pspg.engine.evaluation import map_pictures as module
from pspg.engine.evaluation.map_pictures import draw_maps
from pspg.engine.evaluation.similarity_maps import similarity_maps
from pspg.engine.models.fusions import FUSIONS
from pspg.engine.utils.errors import UserError

Make = Callable[..., Path]


def test_positions_add_up_to_the_log_odds() -> None:
    """Under fusion `ungated`, with the global token's share."""
    torch.manual_seed(0)
    tokens, text = torch.randn(3, 10, 8).double(), normalize(torch.randn(2, 5, 8).double(), dim=-1)
    scale = torch.tensor(1.5).double()
    logits, _ = FUSIONS["ungated"]().double().class_logits(scale, tokens, *text)
    maps = similarity_maps(tokens, *text, scale)
    assert maps.shape == (3, 5, 3, 3)
    whole = scale.exp() * normalize(tokens[:, 0], dim=-1) @ (text[0] - text[1]).T
    torch.testing.assert_close(maps.sum(dim=(2, 3)) + whole, logits[:, 0] - logits[:, 1])


def test_a_token_lies_where_its_patch_does() -> None:
    """Tokens go row by row."""
    tokens = torch.zeros(1, 5, 3)
    tokens[..., 2] = 1.0
    tokens[0, 2] = torch.tensor([1.0, 0, 0])
    maps = similarity_maps(tokens, torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 1.0, 0]]), torch.tensor(0.0))
    assert maps.tolist() == [[[[0, 1], [0, 0]]]]


@pytest.mark.parametrize("count", [0, 3, 48])
def test_tokens_that_are_no_square_grid_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=rf"^maps: the backbone's {count} local tokens are no square grid"):
        similarity_maps(torch.randn(2, 1 + count, 4), torch.randn(3, 4), torch.randn(3, 4), torch.tensor(0.0))


def test_the_picture_shows_the_map_where_it_belongs() -> None:
    def picture(row: int, column: int) -> np.ndarray:
        maps = torch.full((1, 2, 2), -1.0)
        maps[0, row, column] = 1.0
        data = draw_maps(np.zeros((32, 32), np.uint8), maps, ["a"], [0.5], limit=1.0, title="t")
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)

    def centre(mask: np.ndarray) -> np.ndarray:
        assert mask.sum() > 100
        return np.argwhere(mask).mean(axis=0)

    right, low = picture(0, 1), picture(1, 0)
    redder = (right - low)[..., 0]
    above, below = centre(redder > 60), centre(redder < -60)
    assert above[0] < below[0] - 20
    assert above[1] > below[1] + 20


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls that draw, instead of the slow pictures."""
    calls: list[dict[str, Any]] = []

    def record(film: np.ndarray, maps: torch.Tensor, names: list[str], found: list[float], **other: Any) -> bytes:
        calls.append({"film": film, "maps": maps, "names": names, "found": found, **other})
        return b"picture"

    monkeypatch.setattr(module, "draw_maps", record)
    return calls


def run(checkpoint: Path, source: Path, folder: Path, *arguments: str) -> int:
    command = ["predict", "--checkpoint", str(checkpoint), "--input", str(source), "--workers", "0"]
    return main([*command, "--output", str(folder / "scores.csv"), "--maps", str(folder / "maps"), *arguments])


def scores(folder: Path) -> dict[str, dict[str, float]]:
    with (folder / "scores.csv").open(newline="") as file:
        return {row.pop("id"): {k: float(v) for k, v in row.items()} for row in csv.DictReader(file)}


def test_every_image_has_a_picture_of_its_own(
    model_folder: Make, image_folder: Path, tmp_path: Path, drawn: list[dict[str, Any]]
) -> None:
    (image_folder / "film.dcm").write_bytes(Path(str(get_testdata_file("RG1_UNCR.dcm", download=False))).read_bytes())
    arguments = ["--class_names", "[gallstone, edema]", "--batch_size", "4"]
    assert run(model_folder(vit=True), image_folder, tmp_path, *arguments) == 0
    files = {path.name for path in (tmp_path / "maps").iterdir()}
    assert files == {"A.png", "a_2.png", "a_3.png", "b_a.png", "b_c_d.png", "film.png"}
    found = scores(tmp_path)
    assert [call["title"] for call in drawn] == list(found)
    for call in drawn:
        row = found[call["title"]]
        assert call["names"] == sorted(row, key=lambda name: -row[name])
        assert call["found"] == pytest.approx([row[name] for name in call["names"]])
        assert call["maps"].shape == (2, 2, 2)
    with Image.open(image_folder / "a.png") as film:
        expected = np.asarray(film.resize((32, 32), Image.Resampling.BICUBIC))
    assert any(np.array_equal(call["film"], expected) for call in drawn)


def test_some_classes_above_a_threshold(
    model_folder: Make,
    image_folder: Path,
    tmp_path: Path,
    drawn: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = model_folder(vit=True)
    assert run(model, image_folder, tmp_path / "all") == 0
    everything, classes = scores(tmp_path / "all"), ["edema", "cardiomegaly"]
    limit = sorted(row[name] for row in everything.values() for name in classes)[7]
    drawn.clear()
    arguments = ["--map_classes", json.dumps(classes), "--map_threshold", str(limit - 1e-7)]
    assert run(model, image_folder, tmp_path / "some", *arguments) == 0
    expected = {id: {n for n in classes if row[n] > limit - 1e-6} for id, row in everything.items()}
    expected = {id: names for id, names in expected.items() if names}
    assert {call["title"]: set(call["names"]) for call in drawn} == expected
    assert sum(map(len, expected.values())) == 3
    assert len(list((tmp_path / "some" / "maps").iterdir())) == len(expected)
    assert f"{len(expected)} images with maps" in capsys.readouterr().err
    assert scores(tmp_path / "some") == everything


def test_many_classes_take_several_pictures(
    model_folder: Make, image_folder: Path, tmp_path: Path, drawn: list[dict[str, Any]]
) -> None:
    names = [f"finding {chr(97 + i)}" for i in range(14)]
    assert run(model_folder(vit=True), image_folder / "a.png", tmp_path, "--class_names", json.dumps(names)) == 0
    assert [len(call["names"]) for call in drawn] == [11, 3]
    assert {name for call in drawn for name in call["names"]} == set(names)
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {"a.png", "a-2.png"}
    assert [call["title"] for call in drawn] == ["a.png (1 of 2)", "a.png (2 of 2)"]
    largest = max(float(call["maps"].abs().max()) for call in drawn)
    assert [call["limit"] for call in drawn] == pytest.approx([largest] * 2)


def test_a_classifier_draws_what_the_model_draws(
    model_folder: Make, image_folder: Path, tmp_path: Path, drawn: list[dict[str, Any]]
) -> None:
    model, classifier = model_folder(vit=True), tmp_path / "classifier"
    export = ["export-checkpoint", "--checkpoint", str(model), "--output", str(classifier), "--layout", "classifier"]
    assert main(export) == 0
    assert run(model, image_folder, tmp_path / "x") == run(classifier, image_folder, tmp_path / "y") == 0
    assert len(drawn) == 10
    for live, frozen in zip(drawn[:5], drawn[5:], strict=True):
        assert live["names"] == frozen["names"]
        torch.testing.assert_close(live["maps"], frozen["maps"], rtol=0, atol=1e-5)


def test_the_pictures_are_pictures(model_folder: Make, image_folder: Path, tmp_path: Path) -> None:
    lines = [{"id": "../$x$", "filepath": "a.png"}, {"id": "_", "filepath": "b/a.png"}]
    (image_folder / "two.jsonl").write_text("\n".join(map(json.dumps, lines)))
    names = json.dumps(
        ["$\\frac{$", "a very long class name that goes on and on, to the end of a line and beyond it, too"]
    )
    arguments = ["--class_names", names, "--context", "batch"]
    assert run(model_folder(), image_folder / "two.jsonl", tmp_path, *arguments) == 0
    files = sorted((tmp_path / "maps").iterdir())
    assert [file.name for file in files] == ["image.png", "x.png"]
    for file in files:
        with Image.open(file) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 250


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--map_classes", "[odema]"], "map_classes: unknown class name 'odema'; did you mean 'edema'?"),
        (["--map_threshold", "1.5"], "map_threshold: must be >= 0 and <= 1, got 1.5"),
        (["--maps", "null", "--map_threshold", "0.5"], "map_threshold: needs maps"),
        (["--maps", "null", "--map_classes", "[edema]"], "map_classes: needs maps"),
        (["--maps", "IMAGES"], "maps: "),
        (["--on_bad_image", "error", "--batch_size", "2"], "z.png"),
    ],
)
def test_a_mistake_leaves_nothing_behind(
    model_folder: Make,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    drawn: list[dict[str, Any]],
    arguments: list[str],
    message: str,
) -> None:
    (image_folder / "z.png").write_bytes(b"no picture")
    arguments = [word.replace("IMAGES", str(image_folder)) for word in arguments]
    before = sorted(image_folder.rglob("*"))
    assert run(model_folder(vit=True), image_folder, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert sorted(image_folder.rglob("*")) == before

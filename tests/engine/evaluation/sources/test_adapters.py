"""`evaluate --adapter`: a user's own Python file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspg.engine.evaluation.sources.adapter import Adapter
from tests.engine.evaluation.sources.reports import ROOT, VIT, document, one_line, probabilities, table, write_clip


def test_the_shipped_adapter_scores_like_the_same_clip(
    phantoms: Path, tmp_path: Path, evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, weights = write_clip(tmp_path, VIT, {}, "open_clip")
    assert evaluate("--clip", tmp_path / "net.json", "--clip_weights", weights, name="clip") == 0
    (tmp_path / "net.json").rename(tmp_path / "open_clip_config.json")
    monkeypatch.setenv("MODEL", f"local-dir:{tmp_path}")
    example = ROOT / "configs" / "adapters" / "open_clip_templates.py"
    lists = json.dumps({"seen": str(phantoms / "seen.txt"), "unseen": str(phantoms / "unseen.txt")})
    assert evaluate("--adapter", example, "--workers", 2, "--class_lists", lists) == 0
    assert list(document(tmp_path / "report")["results"]) == ["open_clip_templates"]
    order = table(tmp_path / "report" / "predictions.csv")[0][1:]
    columns = [table(tmp_path / "clip" / "predictions.csv")[0][1:].index(name) for name in order]
    expected = probabilities(tmp_path / "clip")[:, columns]
    np.testing.assert_allclose(probabilities(tmp_path / "report"), expected, atol=1e-5)


ADAPTER = """
import torch
def load(device):
    return 1.0
def preprocess(image):
    return torch.tensor([image.width, image.height], dtype=torch.float32)
def score(model, images, class_names):
    return torch.full((len(images), len(class_names)), 0.5)
"""


@pytest.mark.parametrize(
    ("line", "other", "message"),
    [
        ("import torch", "import torch, no_such_library", "x.py:2: ModuleNotFoundError: No module named 'no_such_"),
        ("import torch", "import torch(", "x.py:2: SyntaxError: "),
        ("return 1.0", "raise ValueError('no\\nweights')", "x.py:4: ValueError: no weights in load"),
        ("return 1.0", "raise SystemExit(3)", "x.py:4: SystemExit: 3 in load"),
        ("def score(", "def scores(", "x.py: has no function score(model, images, class_names)"),
        ("def score(model,", "def score(", "x.py:7: TypeError: score() takes"),
        ("return torch.tensor(", "return torch.tensr(", "x.py:6: AttributeError: module 'torch' has no attribute"),
        ("return torch.tensor(", "return list(", "x.py:6: TypeError: list() takes no keyword arguments in preprocess"),
        ("torch.tensor([image.width, image.height], dtype=torch.float32)", "3", "preprocess gave a int, not a torch.T"),
        ("[image.width, image.height]", "[1] * (1 + hash(image.tobytes()) % 99)", "preprocess gave inputs of shapes ("),
        ("return torch.full(", "return torch.fill(", "x.py:8: "),
        ("(len(images), len(class_names))", "(2, 3)", "score gave shape (2, 3) for 16 images and 20 classes"),
        ("0.5)", "1.5)", "score gave values from 1.5 to 1.5; probabilities lie in [0, 1]"),
        ("0.5)", "torch.nan)", "score gave values that are not finite"),
        ("return torch.full((len(images), len(class_names)), 0.5)", "return 'yes'", "score gave a str, not a tensor"),
    ],
)
def test_faults_of_adapters_are_one_line_with_their_place(
    tmp_path: Path, evaluate, capsys: pytest.CaptureFixture[str], line: str, other: str, message: str
) -> None:
    assert ADAPTER.count(line) == 1
    (tmp_path / "x.py").write_text(ADAPTER.replace(line, other))
    for workers in (0, 1) if "preprocess" in message else (0,):
        assert evaluate("--adapter", tmp_path / "x.py", "--workers", workers) == 2
        error = one_line(capsys)
        assert error.startswith("pspg-engine evaluate: error: adapter: ")
        assert message in error
    assert not (tmp_path / "report").exists()


def test_an_adapter_goes_to_other_processes_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(ADAPTER)
    copy = pickle.loads(pickle.dumps(Adapter(str(tmp_path / "x.py"))))
    assert copy.call("preprocess", Image.new("RGB", (3, 2))).tolist() == [3, 2]


def test_an_adapter_survives_bad_images_and_knows_what_lies_beside_it(
    phantoms: Path, tmp_path: Path, evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "beside_the_adapter.py").write_text("HALF = 0.5\n")
    (tmp_path / "x.py").write_text(ADAPTER.replace("0.5", "HALF") + "\nfrom beside_the_adapter import HALF\n")
    lines = [json.loads(line) for line in (phantoms / "test.jsonl").read_text().splitlines()]
    lines[3]["filepath"] = "images/missing.png"
    gap = tmp_path / "gap.jsonl"
    gap.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = ["--manifest", gap, "--image_root", phantoms, "--label_names", phantoms / "classes.txt"]
    assert evaluate("--adapter", tmp_path / "x.py", *more) == 2
    assert "missing.png: no such file" in one_line(capsys)
    assert evaluate("--adapter", tmp_path / "x.py", *more, "--on_bad_image", "skip", "--method", "Half") == 0
    assert "1 unreadable images were left out" in capsys.readouterr().err
    found = document(tmp_path / "report")["results"]
    assert found["Half"]["all"]["images"] == 39
    assert found["Half"]["all"]["macro_auc"] == 0.5

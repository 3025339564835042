"""A source is one file: the example of the guide, as a module of the package, is chosen by its name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pspg.engine.cli import main
from pspg.engine.data.manifest import load_label_names
from pspg.engine.evaluation.report import plots
from pspg.engine.evaluation.sources import SOURCES

ROOT = Path(__file__).parents[4]


@pytest.fixture
def frequency() -> Iterator[None]:
    """The source of the guide, registered for a test."""
    guide = (ROOT / "engine/evaluation/README.md").read_text()
    (text,) = re.findall(r"```python\n(# engine/evaluation/sources/frequency\.py\n.*?)```", guide, re.S)
    package = SOURCES._package
    exec(compile(text, "frequency.py", "exec"), {"__name__": f"{package}.frequency", "__package__": package})
    yield
    del SOURCES._classes["frequency"]


@pytest.fixture
def arguments(phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command that chooses the source; no figures are drawn."""
    for figure in ("curves", "reliability_diagram", "cooccurrence"):
        monkeypatch.setattr(plots, figure, lambda *arguments, **options: {})
    source = json.dumps({"frequency": str(phantoms / "train.jsonl")})
    paths = ["--manifest", str(phantoms / "test.jsonl"), "--output", str(tmp_path / "report")]
    return ["evaluate", "--other_source", source, *paths, "--device", "cpu", "--evaluation.bootstrap", "0"]


@pytest.mark.usefixtures("frequency")
def test_the_source_of_the_guide_is_evaluated(arguments: list[str], phantoms: Path, tmp_path: Path) -> None:
    assert main(arguments) == 0
    document = json.loads((tmp_path / "report/metrics.json").read_text())
    assert list(document["results"]) == ["frequency"]
    assert document["results"]["frequency"]["all"]["macro_auc"] == 0.5
    lines = [json.loads(line) for line in (phantoms / "train.jsonl").read_text().splitlines()]
    names = load_label_names(phantoms / "classes.txt")
    share = np.array([[line["labels"][c] == 1 for c in range(len(names))] for line in lines]).mean(0)
    first = (tmp_path / "report/predictions.csv").read_text().splitlines()[1].split(",")[1:]
    np.testing.assert_allclose(np.array(first, dtype=float), share)


@pytest.mark.usefixtures("frequency")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--checkpoint", "x"], "got --checkpoint and --frequency"),
        (["--probe", "x.jsonl"], "probe: goes with checkpoint or clip, not with frequency"),
        (["--evaluation.context", "bank"], "evaluation.context: only PsPG's scores have a context"),
    ],
)
def test_it_is_checked_like_the_others(
    arguments: list[str], capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main([*arguments, *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"frequency": "x"}', "other_source: 'frequency' is not one of adapter, checkpoint, clip, predictions"),
        ('{"clip": "RN50"}', "other_source: clip has a setting of its own; give --clip"),
    ],
)
def test_names_that_are_no_other_source(
    arguments: list[str], capsys: pytest.CaptureFixture[str], value: str, message: str
) -> None:
    assert main([*arguments, "--other_source", value]) == 2
    assert message in capsys.readouterr().err

"""Groups of classes by how often they occur in training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pspg.engine.cli import main
from pspg.engine.evaluation.prevalence import prevalence_groups


def test_shares_are_those_of_known_labels() -> None:
    labels = np.zeros((200, 5))
    labels[:40, 0] = 1
    labels[:20, 1] = 1  # a tenth is not more than a tenth
    labels[:2, 2] = 1  # nor is a hundredth less than one
    labels[:1, 3] = 1
    labels[100:, 3] = -1  # one of a hundred
    labels[:, 4] = -1
    found = prevalence_groups(labels, list("abcde"), head=0.1, tail=0.01)
    assert found == {"head": ["a"], "medium": ["b", "c", "d"], "tail": ["e"]}
    assert prevalence_groups(labels[:, :1], ["a"], head=0.1, tail=0.01) == {"head": ["a"]}


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., int]:
    """Function (arguments) → exit status of an evaluation of random probabilities; three classes, one in training."""
    names = ["edema", "mass", "nodule"]
    noise = np.random.default_rng(0)
    rows = []
    for number in range(40):
        labels = [number % 2, int(number % 10 == 0), int(number == 7)]
        rows.append({"id": f"i{number}", "filepath": f"{number}.png", "labels": labels})
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "classes.txt").write_text("\n".join(names))
    (tmp_path / "seen.txt").write_text("edema\nmass\n")
    lines = ["id," + ",".join(names), *(f"i{n}," + ",".join(map(str, noise.random(3))) for n in range(40))]
    (tmp_path / "p.csv").write_text("\n".join(lines))
    words = ["evaluate", "--predictions", "p.csv", "--manifest", "test.jsonl", "--output", "report"]
    words = [str(tmp_path / word) if "." in word or word == "report" else word for word in words]
    return lambda *arguments: main([*words, "--evaluation.bootstrap", "0", *map(str, arguments)])


def test_a_report_has_the_groups(evaluate: Callable[..., int], tmp_path: Path) -> None:
    lists = json.dumps({"seen": str(tmp_path / "seen.txt")})
    settings = ["--frequencies", tmp_path / "train.jsonl", "--head_above", 0.2, "--tail_below", 0.05]
    assert evaluate(*settings) == 0
    document = json.loads((tmp_path / "report/metrics.json").read_text())
    groups = document["results"]["p"]
    assert list(groups) == ["all", "head", "medium", "tail"]
    by_class = {row["name"]: row["ap"] for row in groups["all"]["per_class"]}
    assert [groups[group]["map_ap"] for group in ("head", "medium", "tail")] == list(by_class.values())
    assert evaluate(*settings, "--class_lists", lists, "--output", tmp_path / "other") == 0
    found = json.loads((tmp_path / "other/metrics.json").read_text())["results"]["p"]
    assert list(found) == ["all", "head", "medium", "seen"]
    assert len(found["all"]["per_class"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frequencies", "gone.jsonl"], "gone.jsonl"),
        (["--head_above", "0.1", "--tail_below", "0.2"], "tail_below: 0.2 is above head_above 0.1"),
        (["--frequencies", "train.jsonl", "--class_lists", "LISTS"], "class_lists: 'tail' is a group by prevalence"),
    ],
)
def test_groups_that_cannot_be_are_one_line(
    evaluate: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    lists = json.dumps({"tail": str(tmp_path / "seen.txt")})
    words = [lists if word == "LISTS" else word for word in arguments]
    assert evaluate(*(tmp_path / word if word.endswith(".jsonl") else word for word in words)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1

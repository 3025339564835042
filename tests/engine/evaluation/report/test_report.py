"""The report's files: complete, escaped, and safe to open in a spreadsheet or a browser."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from pspg.engine.config import EvaluationConfig
from pspg.engine.evaluation.metrics import evaluate_groups
from pspg.engine.evaluation.report import plots
from pspg.engine.evaluation.report.evaluation import Evaluation, MethodResult, measure
from pspg.engine.evaluation.report.write import write_report
from pspg.engine.utils.errors import UserError

SCRIPT = "<script>alert('x')</script>"
FORMULA = '=HYPERLINK("http://x")'
NAMES = ["Edema", SCRIPT, FORMULA, "cost $x^$ | _y", "Hernia"]
GROUPS = {"all": NAMES, "seen": NAMES[:2], "unseen": NAMES[2:]}
IDS = [f"image {n}" for n in range(29)] + ["@SUM(A1)"]
FILES = ["MODEL_CARD.md", "metrics.json", "per_class.csv", "predictions.csv", "report.html"]


class Page(HTMLParser):
    """Tags, and text outside of scripts and styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def arguments() -> dict[str, Any]:
    """Five classes of which Hernia has no positives, with a baseline that guesses."""
    rng = np.random.default_rng(0)
    labels = rng.choice([1, 0, -1], p=[0.4, 0.5, 0.1], size=(30, 5))
    labels[:, 4] = 0
    probabilities = np.clip(0.4 * labels + rng.random((30, 5)) * 0.6, 0, 1).astype(np.float32)
    guesses = rng.random((30, 5))
    settings = EvaluationConfig(bootstrap=20)
    return {
        "title": "Phantom & friends",
        "methods": [
            measure("PsPG", labels, probabilities, GROUPS, settings, parameters=5, progress=False),
            MethodResult("CLIP", evaluate_groups(labels, guesses, NAMES, GROUPS)),
        ],
        "class_names": NAMES,
        "ids": IDS,
        "labels": labels,
        "probabilities": probabilities,
        "settings": {
            "context": "batch",
            "batch_size": 7,
            "checkpoint": Path("runs/best"),
            "note": SCRIPT,
            "manifest": "data/test.jsonl",
        },
        "library": "pspg-engine",
        "notes": ["Phantoms are no clinical data."],
        "training": [{"step": 1, "loss": 2.0, "lr": 1e-4}, {"step": 2, "loss": 1.0, "lr": None}],
    }


@pytest.fixture(scope="module")
def folder(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "new" / "report"
    picture = plots.cooccurrence(arguments["labels"], NAMES)
    evaluation = Evaluation(**arguments, pictures=[(f"caption {SCRIPT}", picture)])
    page = write_report(folder, evaluation, progress=False)
    assert page == folder / "report.html"
    assert sorted(path.name for path in folder.iterdir()) == FILES  # no temporary file is left
    return folder


def test_json_holds_the_numbers_and_the_context(folder: Path, arguments: dict[str, Any]) -> None:
    text = (folder / "metrics.json").read_text()
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    found = document["results"]["PsPG"]["all"]
    assert found["macro_auc"] == arguments["methods"][0].metrics["all"].macro_auc
    assert found["intervals"]["map_ap"]["low"] == arguments["methods"][0].intervals["all"].map_ap.low
    assert found["per_class"][4]["auc"] is None
    assert found["skipped"] == [{"name": "Hernia", "reason": "no positives among 30 labelled images (0 masked)"}]
    assert document["results"]["CLIP"]["unseen"]["map_ap"] == arguments["methods"][1].metrics["unseen"].map_ap
    assert document["settings"]["context"] == "batch"
    assert document["settings"]["batch_size"] == 7


def test_csv_text_is_neutralised_and_numbers_are_not(folder: Path, arguments: dict[str, Any]) -> None:
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["id", NAMES[0], SCRIPT, "'" + FORMULA, *NAMES[3:]]
    assert rows[-1][0] == "'@SUM(A1)"
    values = np.array([row[1:] for row in rows[1:]], dtype=np.float32)
    np.testing.assert_array_equal(values, arguments["probabilities"])

    with (folder / "per_class.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2 * 10  # two methods; five classes in "all", five in its parts
    assert [row["class"] for row in table[:5]] == [*NAMES[:2], "'" + FORMULA, *NAMES[3:]]
    assert table[4]["auc"] == table[4]["auc_low"] == ""
    worst = min(arguments["methods"][1].metrics["all"].per_class[:4], key=lambda row: row.mcc)
    assert worst.mcc < 0
    assert str(worst.mcc) in [row["mcc"] for row in table]


def test_html_is_escaped_and_self_contained(folder: Path) -> None:
    source = (folder / "report.html").read_text()
    page = Page(source)
    assert SCRIPT not in source
    assert SCRIPT in page.text
    assert sum(tag == "script" for tag, _ in page.tags) == 1  # the page's own, which sorts the table
    assert "Phantoms are no clinical data." in page.text
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 5  # curves, bars, co-occurrence, training, one picture
    assert all(image.startswith("data:image/png;base64,") for image in images)
    assert not any(tag in ("link", "iframe") or "http" in str(attributes.get("src")) for tag, attributes in page.tags)
    assert "Left out of the averages: 1 of 5 classes" in page.text


def test_model_card_says_what_it_must(folder: Path) -> None:
    card = (folder / "MODEL_CARD.md").read_text()
    assert SCRIPT not in card
    assert "Not for clinical use" in card
    assert "Context `batch`, batch size 7" in card
    assert "depends on the class list" in card
    table = [line for line in card.splitlines() if line.startswith(("| Classes", "| ---", "| all", "| seen", "| uns"))]
    assert len(table) == 2 + 6 + 1  # heads of two tables, three groups by two methods
    assert len({line.replace(r"\|", "").count("|") for line in table[:-1]}) == 1


def test_model_card_has_the_front_matter_of_the_hub(folder: Path, arguments: dict[str, Any]) -> None:
    card = ModelCard.load(folder / "MODEL_CARD.md")
    assert card.data.model_name == "PsPG"
    assert card.data.library_name == "pspg-engine"
    assert "pspg" in card.data.tags
    assert card.data.license is None
    found = {(r.dataset_name, r.dataset_config, r.metric_type): r.metric_value for r in card.data.eval_results}
    metrics = arguments["methods"][0].metrics
    assert found == {
        ("test", f"classes: {group}", key): round(getattr(metrics[group], key), 4)
        for group in GROUPS
        for key in ("macro_auc", "micro_auc", "map_ap")
    }
    assert card.text.lstrip().startswith("# Phantom ")


def test_settings_must_tell_the_context(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="context"):
        Evaluation(**(arguments | {"settings": {"batch_size": 7}}))


def test_bad_pictures_and_scores_leave_no_file(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png: cannot be read"):
        write_report(tmp_path / "report", Evaluation(**arguments, pictures=[("gone", tmp_path / "gone.png")]))
    with pytest.raises(UserError, match="neither PNG nor JPEG"):
        write_report(tmp_path / "report", Evaluation(**arguments, pictures=[("page", b"<html>")]))
    bad = np.where(np.eye(30, 5) == 1, np.nan, arguments["probabilities"])
    with pytest.raises(UserError, match=r"class 'Edema' \(and 4 other classes\): 1 of 30 rows"):
        Evaluation(**(arguments | {"probabilities": bad}))
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("classes", [1, 5, 24])
def test_figures_of_any_class_count(classes: int) -> None:
    rng = np.random.default_rng(classes)
    labels, probabilities = rng.integers(-1, 2, (40, classes)), rng.random((40, classes))
    names = [f"_class ${c}$" for c in range(classes)]
    metrics = evaluate_groups(labels, probabilities, names, {"all": names})["all"]
    half = {name: "seen" if c % 2 else "unseen" for c, name in enumerate(names[: classes - 1])}
    for png in (
        plots.curves(labels, probabilities, names, group_of=half),
        plots.class_bars(metrics, group_of=half),
        plots.cooccurrence(labels, names),
    ):
        assert png.startswith(b"\x89PNG")


def test_figures_without_anything_to_draw() -> None:
    labels, probabilities = np.zeros((3, 2)), np.full((3, 2), 0.5)
    metrics = evaluate_groups(labels, probabilities, NAMES[:2], {"all": NAMES[:2]})["all"]
    assert plots.curves(labels, probabilities, NAMES[:2]).startswith(b"\x89PNG")
    assert plots.class_bars(metrics).startswith(b"\x89PNG")
    assert plots.training_curves([]) is None
    assert plots.training_curves([{"step": 1, "epoch": 0, "loss": None}]) is None


def test_thinned_curves_keep_their_shape() -> None:
    x = np.sort(np.random.default_rng(0).random(50_000))
    for curve in (x, x[::-1]):
        short, y = plots._thin(curve, 2 * curve)
        assert short.size <= 800
        assert (short[0], short[-1]) == (curve[0], curve[-1])
        np.testing.assert_array_equal(y, 2 * short)
        assert np.abs(np.diff(short)).max() < 0.01

"""The report's files: complete, escaped, and safe to open in a spreadsheet or a browser."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pspg.engine.evaluation.bootstrap import bootstrap_groups
from pspg.engine.evaluation.metrics import evaluate_groups
from pspg.engine.evaluation.report import plots
from pspg.engine.evaluation.report.write import safe_cell, write_csv, write_report, write_text
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
    options = {"resamples": 20, "progress": False}
    return {
        "title": "Phantom & friends",
        "metrics": evaluate_groups(labels, probabilities, NAMES, GROUPS),
        "intervals": bootstrap_groups(labels, probabilities, NAMES, GROUPS, **options),
        "baselines": {"CLIP": evaluate_groups(labels, guesses, NAMES, GROUPS)},
        "class_names": NAMES,
        "ids": IDS,
        "labels": labels,
        "probabilities": probabilities,
        "settings": {"context": "batch", "batch_size": 7, "checkpoint": Path("runs/best"), "note": SCRIPT},
        "notes": ["Phantoms are no clinical data."],
        "training": [{"step": 1, "loss": 2.0, "lr": 1e-4}, {"step": 2, "loss": 1.0, "lr": None}],
        "progress": False,
    }


@pytest.fixture(scope="module")
def folder(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "new" / "report"
    picture = plots.cooccurrence(arguments["labels"], NAMES)
    page = write_report(folder, **arguments, pictures=[(f"caption {SCRIPT}", picture)])
    assert page == folder / "report.html"
    assert sorted(path.name for path in folder.iterdir()) == FILES  # no temporary file is left
    return folder


def test_json_holds_the_numbers_and_the_context(folder: Path, arguments: dict[str, Any]) -> None:
    text = (folder / "metrics.json").read_text()
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    found = document["results"]["PsPG"]["all"]
    assert found["macro_auc"] == arguments["metrics"]["all"].macro_auc
    assert found["intervals"]["map_ap"]["low"] == arguments["intervals"]["all"].map_ap.low
    assert found["per_class"][4]["auc"] is None
    assert found["skipped"] == [{"name": "Hernia", "reason": "no positives among 30 labelled images (0 masked)"}]
    assert document["results"]["CLIP"]["unseen"]["map_ap"] == arguments["baselines"]["CLIP"]["unseen"].map_ap
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
    worst = min(arguments["baselines"]["CLIP"]["all"].per_class[:4], key=lambda row: row.mcc)
    assert worst.mcc < 0
    assert str(worst.mcc) in [row["mcc"] for row in table]


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@a", "\ta", "\ra"])
def test_safe_cell(text: str) -> None:
    assert safe_cell(text) == "'" + text
    assert safe_cell("a" + text) == "a" + text


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


def test_settings_must_tell_the_context(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="context"):
        write_report(tmp_path / "report", **(arguments | {"settings": {"batch_size": 7}}))
    assert not (tmp_path / "report").exists()


def test_bad_pictures_and_scores_leave_no_file(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png: cannot be read"):
        write_report(tmp_path / "report", **arguments, pictures=[("gone", tmp_path / "gone.png")])
    with pytest.raises(UserError, match="neither PNG nor JPEG"):
        write_report(tmp_path / "report", **arguments, pictures=[("page", b"<html>")])
    bad = np.where(np.eye(30, 5) == 1, np.nan, arguments["probabilities"])
    with pytest.raises(UserError, match=r"class 'Edema' \(and 4 other classes\): 1 of 30 rows"):
        write_report(tmp_path / "report", **(arguments | {"probabilities": bad}))
    assert not (tmp_path / "report").exists()


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_csv(path, ["a"], [[-1.5], [np.float32("nan")], [Path("=x")]])

    def rows() -> Any:
        yield [1]
        raise RuntimeError("out of rows")

    with pytest.raises(RuntimeError, match="out of rows"):
        write_csv(path, ["a"], rows())
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert path.read_text().split("\n") == ["a", "-1.5", '""', "'=x", ""]
    assert list(tmp_path.iterdir()) == [path]


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

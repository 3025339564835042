"""The report's files: complete, escaped, and safe to open in a spreadsheet or a browser."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from pspg.engine.config import EvaluationConfig
from pspg.engine.evaluation.bootstrap import interval
from pspg.engine.evaluation.calibration import fit_classes, log_odds
from pspg.engine.evaluation.metrics import evaluate_groups
from pspg.engine.evaluation.reliability import reliability
from pspg.engine.evaluation.report import plots
from pspg.engine.evaluation.report.differences import class_differences, differences
from pspg.engine.evaluation.report.evaluation import Evaluation, Fitted, MethodResult, Picture, measure
from pspg.engine.evaluation.report.gallery import choose_entries
from pspg.engine.evaluation.report.operating import operating
from pspg.engine.evaluation.report.write import write_report
from pspg.engine.utils.errors import UserError

SCRIPT = "<script>alert('x')</script>"
FORMULA = '=HYPERLINK("http://x")'
NAMES = ["Edema", SCRIPT, FORMULA, "cost $x^$ | _y", "Hernia"]
GROUPS = {"all": NAMES, "seen": NAMES[:2], "unseen": NAMES[2:]}
IDS = [f"image {n}" for n in range(29)] + ["@SUM(A1)"]
out = io.BytesIO()
Image.new("L", (4, 4)).save(out, "PNG")
PNG = out.getvalue()
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
        "train": {"Edema": (30, 100), SCRIPT: (5, 100)},
        "splits": {"training": 100, SCRIPT: 30},
        "training": [{"step": 1, "loss": 2.0, "lr": 1e-4}, {"step": 2, "loss": 1.0, "lr": None}],
    }


@pytest.fixture(scope="module")
def folder(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "new" / "report"
    shot = Picture("miss", f"caption {SCRIPT}", PNG)
    evaluation = Evaluation(**arguments, pictures=[(f"caption {SCRIPT}", PNG)], gallery=[shot])
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
    assert len(images) == 2  # the picture, and that of the gallery
    assert all(image.startswith("data:image/png;base64,") for image in images)
    # ROC, precision–recall, reliability, shares, co-occurrence, loss, learning rate
    assert sum(tag == "svg" for tag, _ in page.tags) == 7
    assert "<!--" not in source
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
    found = plots.curves(labels, probabilities, names, group_of=half)
    for svg in (*found.values(), plots.cooccurrence(labels, names)):
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    drawn = [c for c, row in enumerate(metrics.per_class) if row.positives and row.negatives]
    for kind in ("roc", "pr"):
        assert re.findall(rf'id="{kind}-(\d+)"', found[kind]) == [str(c) for c in drawn]
    assert ("10–90 %" in found["roc"]) == (classes > plots.DRAWN)


def test_figures_without_anything_to_draw() -> None:
    labels, probabilities = np.zeros((3, 2)), np.full((3, 2), 0.5)
    assert plots.curves(labels, probabilities, NAMES[:2])["roc"].startswith("<svg")
    assert plots.training_curves([]) == []
    assert plots.training_curves([{"step": 1, "epoch": 0, "loss": None}]) == []
    assert plots.prevalence([0.1, 0.0], [0.0, 0.1], NAMES[:2]) is None
    assert plots.reliability_diagram({"a": reliability(np.full((3, 2), -1), probabilities)}) is None


def test_thinned_curves_keep_their_shape() -> None:
    x = np.sort(np.random.default_rng(0).random(50_000))
    for curve in (x, x[::-1]):
        short, y = plots.thin(curve, 2 * curve, 800)
        assert short.size <= 800
        assert (short[0], short[-1]) == (curve[0], curve[-1])
        np.testing.assert_array_equal(y, 2 * short)
        assert np.abs(np.diff(short)).max() < 0.01


def test_numbers_and_colours_of_texts_stay() -> None:
    """Coordinates are shortened and colours become the page's, but no text."""
    name = "1.23456 #1f2937"
    svg = plots.reliability_diagram({name: reliability(np.array([[1], [0]]), np.array([[0.9], [0.2]]))})
    assert svg is not None
    assert f">{name}</text>" in svg
    assert "var(--ink)" in svg
    assert not re.search(r' d="[^"]*\.\d{3}', svg)


def test_differences_are_paired(arguments: dict[str, Any]) -> None:
    labels, settings = arguments["labels"], EvaluationConfig(bootstrap=50)
    rng = np.random.default_rng(5)
    scores = [np.clip(arguments["probabilities"] + shift * rng.random((30, 5)), 0, 1) for shift in (0.1, 0.3)]
    one, two = (measure(n, labels, s, GROUPS, settings, progress=False) for n, s in zip("ab", scores, strict=True))
    evaluation = Evaluation(**(arguments | {"methods": [one, two], "probabilities": scores[0]}))
    found = differences(evaluation, two, "all")["macro_auc"]
    assert found.value == one.metrics["all"].macro_auc - two.metrics["all"].macro_auc
    assert found.interval == interval(one.samples["all"].macro_auc - two.samples["all"].macro_auc)
    each = class_differences(evaluation, two)
    assert each["Edema"]["ap"].interval == interval(one.samples["all"].ap[:, 0] - two.samples["all"].ap[:, 0])
    same = Evaluation(**(arguments | {"methods": [one, one], "probabilities": scores[0]}))
    assert (differences(same, one, "all")["map_ap"].value, differences(same, one, "all")["map_ap"].clear) == (0, False)
    assert differences(Evaluation(**arguments), arguments["methods"][1], "all") == {}  # it was not resampled


def test_a_ceiling_is_never_the_best(arguments: dict[str, Any], tmp_path: Path) -> None:
    labels = arguments["labels"]
    perfect = np.clip(labels, 0, 1).astype(float)
    top = MethodResult("probe", evaluate_groups(labels, perfect, NAMES, GROUPS), ceiling=True)
    write_report(tmp_path, Evaluation(**(arguments | {"methods": [*arguments["methods"], top]})), progress=False)
    rows = re.findall(r'<tr class="ceiling">.*?</tr>', (tmp_path / "report.html").read_text(), re.S)
    assert len(rows) == len(GROUPS)
    assert all("1.000" in row and "best" not in row for row in rows)
    assert 'class="best"' in (tmp_path / "report.html").read_text()


def test_what_was_fitted_is_applied(arguments: dict[str, Any], tmp_path: Path) -> None:
    labels, probabilities = arguments["labels"].astype(np.int8), arguments["probabilities"].astype(float)
    classes, reasons = fit_classes(log_odds(probabilities), labels, NAMES, min_positives=2)
    fitted = Fitted(classes, reasons, "best F1", f"val {SCRIPT}", 30)
    evaluation = Evaluation(**(arguments | {"fitted": fitted}))
    found = operating(evaluation)
    assert found.after is not None
    assert found.after.brier < found.before.brier
    assert [row.name for row in found.classes] == NAMES[:4]
    write_report(tmp_path, evaluation, progress=False)
    source = (tmp_path / "report.html").read_text()
    assert SCRIPT not in source
    assert "Left as they are: Hernia (no positives in the validation)." in Page(source).text
    assert "Calibrated on 30 validation images" in (tmp_path / "MODEL_CARD.md").read_text()
    document = json.loads((tmp_path / "metrics.json").read_text())
    assert document["operating"]["classes"][0]["tp"] == found.classes[0].tp
    assert document["fitted"]["classes"][4]["group"] is None


def test_classes_come_by_their_auc(folder: Path, arguments: dict[str, Any]) -> None:
    table = (folder / "report.html").read_text().split('id="class-table"')[1].split("</table>")[0]
    rows = [Page(row).text.split()[0] for row in re.findall(r'<td class="name">(.*?)</td><td class="name">', table)]
    order = sorted(arguments["methods"][0].metrics["all"].per_class[:4], key=lambda row: -row.auc)
    assert rows == [row.name.split()[0] for row in order] + ["Hernia"]


def test_a_gallery_shows_the_clearest_entries() -> None:
    labels = np.array([[1, 0], [1, -1], [0, 1], [0, 0], [1, 1]], np.int8)
    scores = np.array([[0.9, 0.2], [0.1, 0.99], [0.8, 0.6], [0.45, 0.3], [0.7, 0.1]])
    chosen = choose_entries(labels, scores, np.array([0.5, 0.5]), 1)
    assert [(c.kind, c.row, c.column) for c in chosen] == [
        ("hit", 0, 0),
        ("miss", 1, 0),
        ("alarm", 2, 0),
        ("uncertain", 3, 0),
    ]
    two = choose_entries(labels, scores, np.array([0.5, np.nan]), 2)
    assert [(c.kind, c.row, c.column) for c in two if c.kind == "hit"] == [("hit", 0, 0), ("hit", 4, 0)]

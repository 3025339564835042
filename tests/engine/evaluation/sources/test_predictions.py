"""`evaluate --predictions`: a table of probabilities from anywhere."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from pspg.engine.cli import main
from pspg.engine.data.manifest import load_label_names
from tests.engine.evaluation.sources.reports import document, one_line, probabilities, table


@pytest.fixture
def predictions(models: Path, phantoms: Path, evaluate, tmp_path: Path) -> Path:
    """predictions.csv of a PsPG report in the folder `first`."""
    assert evaluate("--checkpoint", models / "pspg", "--baselines", "false", name="first") == 0
    return tmp_path / "first" / "predictions.csv"


def write(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_predictions_fed_back_give_the_same_numbers(
    models: Path, phantoms: Path, tmp_path: Path, evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = json.dumps({"seen": str(phantoms / "seen.txt"), "unseen": str(phantoms / "unseen.txt")})
    lists = ["--class_lists", lists, "--evaluation.bootstrap", 20]
    assert evaluate("--checkpoint", models / "pspg", "--baselines", "false", *lists, name="first") == 0
    header, *rows = table(tmp_path / "first" / "predictions.csv")
    rows = [[*row, "7"] for row in reversed(rows)] + [["another film", *row[1:], "7"] for row in rows[:2]]
    shuffled = write(tmp_path / "kad.csv", [[*header, "no class"], *rows])
    lines = [json.loads(line) for line in (phantoms / "test.jsonl").read_text().splitlines()]
    away = tmp_path / "away"
    away.mkdir()
    (away / "test.jsonl").write_text("".join(json.dumps({**line, "filepath": "no/film.png"}) + "\n" for line in lines))
    names = ["--label_names", phantoms / "classes.txt", "--manifest", away / "test.jsonl"]
    capsys.readouterr()
    assert evaluate("--predictions", shuffled, *lists, *names, name="second") == 0
    assert "kad.csv: 2 rows and 1 columns that were not asked for were left out" in capsys.readouterr().err
    first, second = document(tmp_path / "first"), document(tmp_path / "second")
    assert second["results"]["kad"] == first["results"]["PsPG"]
    assert second["results"].keys() == second["trainable_parameters"].keys() == {"kad"}
    assert second["trainable_parameters"]["kad"] is None
    assert second["settings"]["batch_size"] is None
    assert (tmp_path / "second" / "predictions.csv").read_text() == (tmp_path / "first" / "predictions.csv").read_text()
    assert "batch size" not in (tmp_path / "second" / "report.html").read_text()


def test_scores_that_differ_in_the_last_digit_keep_their_order(phantoms: Path, tmp_path: Path, evaluate) -> None:
    """Saturated models give such scores; a table that rounded them would have ties."""
    lines = [json.loads(line) for line in (phantoms / "test.jsonl").read_text().splitlines()]
    names = load_label_names(phantoms / "classes.txt")
    rows = [[line["id"], *[repr(1 - (number + 1) * 2**-50)] * len(names)] for number, line in enumerate(lines)]
    given = write(tmp_path / "sure.csv", [["id", *names], *rows])
    assert evaluate("--predictions", given) == 0
    again = tmp_path / "report" / "predictions.csv"
    assert [row[1:] for row in table(again)[1:]] == [row[1:] for row in rows]


def test_images_without_predictions_are_left_out_on_request(
    predictions: Path, tmp_path: Path, evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = table(predictions)
    few = write(tmp_path / "few.csv", rows[:-3])
    capsys.readouterr()
    assert evaluate("--predictions", few) == 2
    assert f"few.csv: has no row for id '{rows[-3][0]}' and 2 others of the manifest's 40 images" in one_line(capsys)
    assert evaluate("--predictions", few, "--on_bad_image", "skip") == 0
    assert f"few.csv: 3 images have no row and were left out, the first '{rows[-3][0]}'" in capsys.readouterr().err
    assert document(tmp_path / "report")["results"]["few"]["all"]["images"] == 37
    none = write(tmp_path / "none.csv", rows[:1])
    assert evaluate("--predictions", none, "--on_bad_image", "skip") == 2
    assert "none.csv: has no row for id" in one_line(capsys)


@pytest.mark.parametrize("value", ["", "nan", "inf", "1.5", "-0.1", "high"])
def test_predictions_that_are_no_probabilities_name_row_and_column(
    predictions: Path, tmp_path: Path, evaluate, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    rows = table(predictions)
    rows[3][2] = value
    bad = write(tmp_path / "bad.csv", rows)
    capsys.readouterr()
    assert evaluate("--predictions", bad) == 2
    assert f"bad.csv:4: column {rows[0][2]!r} holds {value!r}, no number in [0, 1]" in one_line(capsys)
    assert not (tmp_path / "report").exists()


def test_tables_that_do_not_fit_name_the_row_or_column(
    predictions: Path, tmp_path: Path, evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    header, *rows = table(predictions)
    faults = {
        "has no column 'id'": [["name", *header[1:]], *rows],
        f"has no column {header[1]!r}; did you mean '{header[1]}s'?": [["id", header[1] + "s", *header[2:]], *rows],
        f"has two columns {header[1]!r}; remove one": [[*header, header[1]], *([*row, "0"] for row in rows)],
        f"bad.csv:42: id {rows[0][0]!r} is already on line 2": [header, *rows, rows[0]],
        "bad.csv:2: 3 cells, the header has": [header, rows[0][:3]],
    }
    capsys.readouterr()
    for message, content in faults.items():
        assert evaluate("--predictions", write(tmp_path / "bad.csv", content)) == 2
        assert message in one_line(capsys)
    (tmp_path / "bad.csv").write_bytes(b"id,\xff\n")
    assert evaluate("--predictions", tmp_path / "bad.csv") == 2
    assert "not UTF-8" in one_line(capsys)
    assert evaluate("--predictions", tmp_path / "missing.csv") == 2
    assert "missing.csv: cannot be read" in one_line(capsys)


def test_ids_and_names_that_spreadsheets_would_run_come_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"id": name, "filepath": "x.png", "labels": [n % 2, 1 - n % 2]} for n, name in enumerate(["=1", "'=", "@a"])
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "classes.txt").write_text("+edema\nplain\n")
    rows = [["id", "plain", "'+edema"], ["'=1", "0.1", "0.2"], ["'=", "0.3", "0.4"], ["@a", "0.5", "0.6"]]
    given = write(tmp_path / "given.csv", rows)
    arguments = ["--manifest", tmp_path / "test.jsonl", "--output", tmp_path / "report", "--evaluation.bootstrap", 0]
    assert main(["evaluate", "--predictions", str(given), *map(str, arguments)]) == 0
    assert probabilities(tmp_path / "report").tolist() == [[0.2, 0.1], [0.4, 0.3], [0.6, 0.5]]

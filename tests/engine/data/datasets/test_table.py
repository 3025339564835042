"""Tables as people have them: paths of several columns, a table a split, words for labels, lists of names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.data.datasets.tables import manifest, write_table

LONG_TAIL = ["dicom_id", "subject_id", "study_id", "ViewPosition", "Atelectasis", "Hernia"]
"""columns in the manner of CXR-LT"""


def run(prepare: Callable[..., str], *options: str, output: str = "out") -> str:
    return prepare("table", "--missing", "keep", *options, output=output)


def test_a_long_tailed_table_a_split_with_classes_unseen_in_training(
    prepare: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    train = [[f"d{i}", 10000 + i, 500 + i, ("PA", "LATERAL")[i % 2], i % 4 == 0, 0.0] for i in range(8)]
    test = [["d9", 19999, 599, "AP", 0, 1, 1], ["d8", 19998, 598, "AP", "", -1, 0]]
    write_table(tmp_path / "train.csv", [LONG_TAIL, *train])
    write_table(tmp_path / "test.csv", [[*LONG_TAIL, "Bulla"], *test])
    tables = f"{{train: {tmp_path / 'train.csv'}, test: {tmp_path / 'test.csv'}}}"
    path = "files/p{subject_id:.2}/p{subject_id}/s{study_id}/{dicom_id}.jpg"
    columns = ["--path_column", path, "--patient_column", "subject_id", "--keep", "{ViewPosition: [PA, AP]}"]
    shown = run(prepare, "--table", tables, *columns)
    found = {split: manifest(tmp_path / "out", split) for split in ("train", "test")}
    assert (tmp_path / "out/classes.txt").read_text() == "Atelectasis\nHernia\nBulla\n"
    assert (tmp_path / "out/seen.txt").read_text() == "Atelectasis\nHernia\n"
    assert (tmp_path / "out/unseen.txt").read_text() == "Bulla\n"
    assert [row["filepath"] for row in found["train"]][:2] == [
        "files/p10/p10000/s500/d0.jpg",
        "files/p10/p10002/s502/d2.jpg",
    ]
    assert [row["labels"] for row in found["train"]] == [[1, 0, None], [0, 0, None], [1, 0, None], [0, 0, None]]
    assert [row["labels"] for row in found["test"]] == [[0, 1, 1], [None, -1, 0]]
    assert len({row["patient_id"] for rows in found.values() for row in rows}) == 6
    assert "4 × ViewPosition is not among those to keep, e.g. train.csv:3" in shown
    assert "warning: train.csv has no labels of Bulla: null in train" in shown
    assert shown.rstrip().endswith("; no image is in val")
    assert f"1 classes have no label; train on the others: data.class_names {tmp_path}/out/seen.txt" in shown


def test_words_for_labels_and_splits(prepare: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rows = [
        ["a.png", "dev", "Present", "TRUE"],
        ["b.png", "train", "absent", "NaN"],
        ["c.png", "train", "unsure", "No"],
    ]
    write_table(tmp_path / "t.csv", [["file", "fold", "Edema", "Mass"], *rows])
    words = ["--label_values", "{present: 1, absent: 0, unsure: -1}", "--split_values", "{dev: val}"]
    columns = ["--table", str(tmp_path / "t.csv"), "--path_column", "file", "--split_column", "fold"]
    run(prepare, *columns, *words)
    assert [row["labels"] for row in manifest(tmp_path / "out", "val")] == [[1, 1]]
    assert [row["labels"] for row in manifest(tmp_path / "out", "train")] == [[0, None], [-1, 0]]
    run(prepare, *columns, *words, "--label_columns", "[Mass]", output="one")
    assert [row["labels"] for row in manifest(tmp_path / "one", "train")] == [[None], [0]]


@pytest.mark.parametrize("together", [True, False])
def test_a_column_of_names_in_one_line_or_several(prepare: Callable[..., str], tmp_path: Path, together: bool) -> None:
    (tmp_path / "in").mkdir()
    rows = [["a.png", "train", "['Mass', 'Edema']"], ["b.png", "train", ""]]
    if not together:
        rows = [["a.png", "train", "Mass"], ["b.png", "train", ""], ["a.png", "train", "Edema"]]
    write_table(tmp_path / "t.csv", [["path", "split", "finding"], *rows])
    run(prepare, "--table", str(tmp_path / "t.csv"), "--names_column", "finding", "--separator", ",")
    assert (tmp_path / "out/classes.txt").read_text() == "Edema\nMass\n"
    assert [row["labels"] for row in manifest(tmp_path / "out", "train")] == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--table", ""], "table: is required"),
        (["--table", "{dev: t.csv}"], "table: 'dev' is not one of train, val, test"),
        (["--table", "none.csv"], "none.csv: "),
        (["--path_column", "Path"], "t.csv: has no column 'Path' in its first line, whose cells commas must separate"),
        (["--path_column", "{ptah}.png"], "has no column 'ptah' in its first line"),
        (["--path_column", "{ptah}.png"], "did you mean path?; --path_column says which"),
        (["--path_column", "{path"], "path_column: '{path' is no pattern"),
        (["--path_column", "{path.__class__}"], "has no column 'path.__class__'"),
        (["--path_column", "{path:>9}"], "path_column: '{path:>9}': braces hold a column"),
        (["--patient_column", "patientid"], "patient_column: t.csv has no column 'patientid'; did you mean patient"),
        (["--label_columns", "[Edma]"], "label_columns: t.csv has no column 'Edma'; did you mean Edema?"),
        (["--ignore_columns", "[x]"], "ignore_columns: t.csv has no column 'x'"),
        (["--keep", "{view: PA}"], "t.csv: has no column 'view'"),
        (["--label_values", "{maybe: 2}"], "label_values: maybe must become 1, 0, -1 or null, got 2"),
        ([], "t.csv:3: column 'Mass' must be 1, 0, -1 or empty; say what other words mean with --label_values"),
        (["--ignore_columns", "[Mass, patient]"], "t.csv:3: column 'split' must be train, val or test; say"),
        (["--names_column", "Mass", "--separator", " "], "separator: must hold a character"),
        (["--split_values", "{dev: vla}"], "split_values: 'vla' is not one of train, val, test"),
    ],
)
def test_mistakes_are_one_line_with_the_place(
    prepare: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    rows = [["a.png", "p", "train", 1, 0], ["b.png", "q", "dev", 1, "secret"]]
    write_table(tmp_path / "t.csv", [["path", "patient", "split", "Edema", "Mass"], *rows])
    table = [] if "--table" in options else ["--table", "t.csv", "--ignore_columns", "[patient]"]
    said = run(prepare, *table, *options)
    assert message in said
    assert "secret" not in said


def test_one_image_in_two_splits_is_refused_with_both_lines(prepare: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_table(tmp_path / "t.csv", [["path", "split", "f"], ["a.png", "train", "x"], ["a.png", "test", "y"]])
    said = run(prepare, "--table", str(tmp_path / "t.csv"), "--names_column", "f")
    assert "t.csv:3: another split or patient than t.csv:2 gives this image" in said

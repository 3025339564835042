"""Preparing on small tables in the official formats."""

from __future__ import annotations

import csv
import gzip
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspg.engine.cli import main
from pspg.engine.data.manifest import load_label_names, load_manifest
from pspg.engine.data.preparation.splits import split_by_hash
from pspg.engine.utils.errors import UserError
from tests.engine.data.datasets.tables import manifest, write_table

PADCHEST = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
NIH = "Data_Entry_2017_v2020.csv"
CHEXPERT = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "Edema", "Fracture"]


def chexpert_tables(folder: Path) -> None:
    prefix, labels = "CheXpert-v1.0-small", ["Edema", "Fracture"]
    train = [
        [f"{prefix}/train/patient00001/study1/view1_frontal.jpg", "F", 60, "Frontal", "AP", "1.0", ""],
        [f"{prefix}/train/patient00001/study1/view2_lateral.jpg", "F", 60, "Lateral", "", "1.0", ""],
        ["train/patient00002/study1/view1_frontal.jpg", "M", 50, "Frontal", "PA", "-1.0", "0.0"],
        ["train/patient00002/study1/view1_frontal.jpg", "M", 50, "Frontal", "PA", "-1.0", "0.0"],
        ["train/patient00002/study1/view1_frontal.jpg", "M", 50, "Frontal", "PA", "1.0", "0.0"],
    ]
    valid = [["CheXpert-v1.0/valid/patient64541/study1/view1_frontal.jpg", "F", 60, "Frontal", "AP", "0.0", "1.0"]]
    test = [
        ["test/patient64741/study1/view1_frontal.jpg", 1, 0],
        ["test/patient64741/study1/view2_lateral.jpg", 1, 0],
    ]
    write_table(folder / "train.csv", [CHEXPERT, *train])
    write_table(folder / "valid.csv", [CHEXPERT, *valid])
    write_table(folder / "test_labels.csv", [["Path", *reversed(labels)], *([p, b, a] for p, a, b in test)])


def test_chexpert(prepare: Callable[..., str], tmp_path: Path) -> None:
    chexpert_tables(tmp_path / "in")
    shown = prepare("chexpert", "--missing", "keep", "--salt", "pepper")
    out = tmp_path / "out"
    first, second = manifest(out, "train")
    assert first["filepath"] == "train/patient00001/study1/view1_frontal.jpg"
    assert (first["labels"], second["labels"]) == ([1, None], [-1, 0])
    assert [row["labels"] for row in manifest(out, "test")] == [[1, 0]]
    loaded = load_manifest(out / "val.jsonl", need="labels")
    assert (loaded.label_names, loaded.samples[0].labels) == (["Edema", "Fracture"], (0.0, 1.0))
    report = json.loads((out / "prepare.json").read_text())
    assert {reason: entry["count"] for reason, entry in report["dropped"].items()} == {
        "lateral view": 2,
        "duplicate row": 1,
        "duplicate row that says something else (the first was kept)": 1,
    }
    assert report["dropped"]["lateral view"]["first"][0].startswith("train.csv:3 ")
    assert "2 × lateral view" in shown
    assert "train: no positive of Fracture" in shown
    counts = json.loads((out / "statistics.json").read_text())["splits"]
    assert counts["train"]["classes"]["Edema"] == {"1": 1, "0": 0, "-1": 1, "null": 0}
    assert (counts["all"]["rows"], counts["all"]["patients"]) == (4, 4)
    with (out / "dropped.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_where_the_images_are_is_remembered(prepare: Callable[..., str], tmp_path: Path) -> None:
    chexpert_tables(tmp_path / "in")
    prepare("chexpert", "--missing", "keep")
    out = tmp_path / "out"
    first = "train/patient00001/study1/view1_frontal.jpg"
    assert load_manifest(out / "train.jsonl", need="image").samples[0].path == tmp_path / "in" / first
    other = tmp_path / "elsewhere"
    other.mkdir()
    assert load_manifest(out / "train.jsonl", image_root=other, need="image").samples[0].path == other / first
    both = tmp_path / "moved"  # together
    both.mkdir()
    (tmp_path / "in").rename(both / "in")
    out.rename(both / "out")
    assert load_manifest(both / "out/train.jsonl", need="image").samples[0].path == both / "in" / first
    (both / "in").rename(both / "gone")
    with pytest.raises(UserError, match=r"prepare\.json: the images were in .*/moved/in, and there is no such folder"):
        load_manifest(both / "out/train.jsonl", need="image")
    for content in ("[]", "{", '{"image_root": 3}', '"x"', "[" * 100_000):
        (both / "out/prepare.json").write_text(content)
        with pytest.raises(UserError, match=r"prepare\.json: cannot be read; give image_root"):
            load_manifest(both / "out/train.jsonl", need="image")


def test_patients_are_hashed_with_the_salt(prepare: Callable[..., str], tmp_path: Path) -> None:
    chexpert_tables(tmp_path / "in")
    ids = []
    for number, salt in enumerate(["pepper", "pepper", "thyme", None, None]):
        prepare("chexpert", "--missing", "keep", *(["--salt", salt] if salt else []), output=f"out{number}")
        ids.append(manifest(tmp_path / f"out{number}", "train")[0]["patient_id"])
        assert not [file for file in (tmp_path / f"out{number}").iterdir() if "pepper" in file.read_text()]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 4


def test_a_patient_in_two_splits_is_refused(prepare: Callable[..., str], tmp_path: Path) -> None:
    chexpert_tables(tmp_path / "in")
    write_table(
        tmp_path / "in/valid.csv",
        [CHEXPERT, ["valid/patient00001/study9/view1_frontal.jpg", "F", 60, "Frontal", "AP", "", "1.0"]],
    )
    error = prepare("chexpert", "--missing", "keep")
    assert "1 patients are in two splits" in error
    assert "train.csv:2 (train)" in error
    assert "valid.csv:2 (val)" in error
    assert "patient00001" not in error


def test_missing_images(prepare: Callable[..., str], tmp_path: Path) -> None:
    chexpert_tables(tmp_path / "in")
    image = tmp_path / "in/train/patient00001/study1/view1_frontal.jpg"
    image.parent.mkdir(parents=True)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(image)
    assert "3 of 4 images are missing" in prepare("chexpert")
    assert "no row is left" in prepare("chexpert", "--missing", "skip", "--image_root", str(tmp_path))
    shown = prepare("chexpert", "--missing", "skip", "--image_size", "8")
    assert "3 × missing image" in shown
    assert "pixels: mean 0.12" in shown
    assert [row["id"] for row in manifest(tmp_path / "out", "train")] == ["train/patient00001/study1/view1_frontal"]


def test_the_archives_of_full_size_chexpert(prepare: Callable[..., str], tmp_path: Path) -> None:
    batch1 = tmp_path / "in/CheXpert-v1.0 batch 1 (validate & csv)"
    chexpert_tables(batch1)
    (batch1 / "test_labels.csv").unlink()
    images = [
        "CheXpert-v1.0 batch 2 (train 1)/patient00001/study1/view1_frontal.jpg",
        "CheXpert-v1.0 batch 4 (train 3)/patient00002/study1/view1_frontal.jpg",
        "CheXpert-v1.0 batch 1 (validate & csv)/valid/patient64541/study1/view1_frontal.jpg",
    ]
    for image in images:
        (tmp_path / "in" / image).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / image).write_bytes(b"x")
    prepare("chexpert", "--pixel_samples", "0")
    assert [row["filepath"] for split in ("train", "val") for row in manifest(tmp_path / "out", split)] == images


def test_outputs(prepare: Callable[..., str], tmp_path: Path) -> None:
    chexpert_tables(tmp_path / "in")
    assert "dry run" in prepare("chexpert", "--missing", "keep", "--dry_run", "true")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    prepare("chexpert", "--missing", "keep")
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    arguments = ["--source", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--missing", "keep"]
    assert main(["prepare", "chexpert", *arguments]) == 2
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def mimic_tables(folder: Path, reports: Path) -> None:
    metadata = [
        ["a", 10000032, 50414267, "PA"],
        ["b", 10000032, 50414267, "LATERAL"],
        ["c", 10000032, 50414267, ""],
        ["d", 11000011, 50000001, "AP"],
        ["e", 12000011, 50000002, "AP"],
        ["f", 13000011, 50000003, "AP"],
    ]
    write_table(
        folder / "mimic-cxr-2.0.0-metadata.csv", [["dicom_id", "subject_id", "study_id", "ViewPosition"], *metadata]
    )
    splits = dict.fromkeys("abcf", "train") | {"d": "validate", "e": "test"}
    write_table(
        folder / "mimic-cxr-2.0.0-split.csv",
        [["dicom_id", "study_id", "subject_id", "split"], *([k, 1, 1, s] for k, s in splits.items())],
    )
    labels = [[10000032, 50414267, "1.0", "-1.0"], [11000011, 50000001, "", "0.0"]]
    write_table(folder / "mimic-cxr-2.0.0-chexpert.csv", [["subject_id", "study_id", "Atelectasis", "Edema"], *labels])
    texts = {
        "p10/p10000032/s50414267": "\ufeffIMPRESION: Atelectasis. Dr. ___ was notified.",
        "p11/p11000011/s50000001": " CONCLUSION:\n 1. Clear.",
        "p12/p12000011/s50000002": "FINDINGS: Clear.",
    }
    for name, text in texts.items():
        path = reports / "files" / f"{name}.txt"
        path.parent.mkdir(parents=True)
        path.write_text(text)


def test_mimic_cxr(prepare: Callable[..., str], tmp_path: Path) -> None:
    mimic_tables(tmp_path / "in", tmp_path / "reports")
    shown = prepare("mimic-cxr", "--missing", "keep", "--reports", str(tmp_path / "reports"))
    out = tmp_path / "out"
    (row,) = manifest(out, "train")
    assert row["filepath"] == "files/p10/p10000032/s50414267/a.jpg"
    assert (row["text"], row["labels"]) == ("Atelectasis.", [1, -1])
    assert [row["text"] for row in manifest(out, "val")] == ["Clear."]
    assert not (out / "test.jsonl").exists()
    for reason in ("not a frontal view", "view position not given", "report without impression", "no report"):
        assert f"1 × {reason}" in shown
    shown = prepare("mimic-cxr", "--missing", "keep", output="labels")
    assert "no text" in shown
    assert manifest(tmp_path / "labels", "test")[0]["labels"] == [None, None]
    assert "reports: " in prepare("mimic-cxr", "--reports", str(tmp_path / "none"), output="x")


def test_padchest_lists(prepare: Callable[..., str], tmp_path: Path) -> None:
    columns = ["", "ImageID", "ImageDir", "PatientID", "Projection", "MethodLabel", "Labels"]
    names = [" laminar atelectasis", "", "normal ", " normal"]
    rows = [
        [i, f"{i}.png", 7, f"p{i}", "PA", "Physician", str(names if i % 2 else ["rare"][: i < 2])] for i in range(6)
    ]
    rows += [[9, "9.png", 7, "p9", "L", "Physician", "['normal']"], [10, "10.png", 7, "p", "PA", "RNN_model", "[]"]]
    rows += [[11, "11.png", 7, "p11", "AP", "Physician", "nan"]]
    write_table(tmp_path / "in" / PADCHEST, [columns, *rows])
    (tmp_path / "in/1.png").write_bytes(b"x")
    shown = prepare(
        "padchest", "--missing", "keep", "--min_positives", "2", "--test_fraction", "1", "--val_fraction", "0"
    )
    assert load_label_names(tmp_path / "out/classes.txt") == ["laminar atelectasis", "normal"]
    assert [row["labels"] for row in manifest(tmp_path / "out", "test")] == [[0, 0], [1, 1]] * 3
    assert manifest(tmp_path / "out", "test")[0]["filepath"] == "7/0.png"
    for reason in ("not labelled by a radiologist", "not a frontal view", "labels that are no list"):
        assert f"1 × {reason}" in shown
    assert "rare (1)" in shown
    options = ["--missing", "skip", "--min_positives", "2", "--pixel_samples", "0"]
    prepare("padchest", *options, "--test_fraction", "1", "--val_fraction", "0", output="found")
    assert [row["filepath"] for row in manifest(tmp_path / "found", "test")] == ["1.png"]


@pytest.mark.parametrize(
    ("choice", "classes", "images"),
    [
        ("keep", ["exclude", "mass", "normal", "suboptimal study", "unchanged"], "01234"),
        ("drop_classes", ["mass", "normal"], "01234"),
        ("drop_images", ["mass", "normal"], "034"),
    ],
)
def test_padchest_labels_that_are_no_findings(
    prepare: Callable[..., str], tmp_path: Path, choice: str, classes: list[str], images: str
) -> None:
    labels = ["['mass', 'unchanged']", "['exclude', 'mass']", "[' suboptimal study ']", "['normal']", "['mass']"]
    columns = ["ImageID", "ImageDir", "PatientID", "Projection", "MethodLabel", "Labels"]
    rows = [[f"{i}.png", 7, f"p{i}", "PA", "Physician", cell] for i, cell in enumerate(labels)]
    write_table(tmp_path / "in" / PADCHEST, [columns, *rows])
    options = ["--missing", "keep", "--min_positives", "1", "--test_fraction", "1", "--val_fraction", "0"]
    shown = prepare("padchest", *options, "--not_findings", choice)
    assert load_label_names(tmp_path / "out/classes.txt") == classes
    assert [row["id"] for row in manifest(tmp_path / "out", "test")] == list(images)
    assert ("3 × class that is no finding" in shown) == (choice == "drop_classes")
    assert ("2 × marked exclude or suboptimal study" in shown) == (choice == "drop_images")


def test_vindr_physionet(prepare: Callable[..., str], tmp_path: Path) -> None:
    train = [["a", "R1", 1, 0, 0], ["a", "R2", 1, 1, 0], ["a", "R3", 0, 0, 1], ["b", "R1", 0, 0, 1]]
    folder = tmp_path / "in/annotations"
    write_table(
        folder / "image_labels_train.csv", [["image_id", "rad_id", "Edema", "Other diseases", "No finding"], *train]
    )
    write_table(
        folder / "image_labels_test.csv", [["image_id", "No finding", "Edema", "Other disease"], ["t", 0, 0, 1]]
    )
    shown = prepare("vindr-cxr", "--missing", "keep", "--val_fraction", "0")
    (row,), (test,) = manifest(tmp_path / "out", "train"), manifest(tmp_path / "out", "test")
    assert (row["filepath"], row["labels"], row.get("patient_id")) == ("train/a.dicom", [1, 0, 0], None)
    assert (test["filepath"], test["labels"]) == ("test/t.dicom", [0, 1, 0])
    assert "1 × fewer readers than min_readers" in shown
    assert "no patient ids" in shown
    prepare("vindr-cxr", "--missing", "keep", "--val_fraction", "0", "--min_readers", "1", output="one")
    assert [row["labels"] for row in manifest(tmp_path / "one", "train")] == [[1, 1, 1], [0, 0, 1]]


def test_chestxray14_lists(prepare: Callable[..., str], tmp_path: Path) -> None:
    # the older table ends every line in a comma
    header = ["Image Index", "Finding Labels", "Patient ID", ""]
    findings = ["Hernia|Pleural_Thickening", "No Finding", "Hernia"]
    rows = [[f"0000000{i}_000.png", findings[i % 3], i, ""] for i in range(6)]
    source = tmp_path / "in"
    write_table(source / "Data_Entry_2017.csv", [header, *rows])
    options = ["--pixel_samples", "0", "--val_fraction", "0"]
    assert "train_val_list.txt" in prepare("chestxray14", *options)
    (source / "train_val_list.txt").write_text("\n".join(row[0] for row in rows[:3]))
    (source / "test_list.txt").write_text("\n".join(row[0] for row in rows[3:5]) + "\n")
    for number, row in enumerate(rows):
        place = source / ("images_003/images" if number % 2 else "images")
        place.mkdir(parents=True, exist_ok=True)
        (place / row[0]).write_bytes(b"x")
    shown = prepare("chestxray14", *options)
    assert load_label_names(tmp_path / "out/classes.txt") == ["Hernia", "No Finding", "Pleural Thickening"]
    train = manifest(tmp_path / "out", "train")
    assert [row["labels"] for row in train] == [[1, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert train[1]["filepath"] == "images_003/images/00000001_000.png"
    assert len(manifest(tmp_path / "out", "test")) == 2
    assert "1 × in neither split list" in shown
    (source / "test_list.txt").write_text(rows[0][0])
    assert "in both split lists" in prepare("chestxray14", *options, output="x")


def test_folder_with_a_table(prepare: Callable[..., str], tmp_path: Path) -> None:
    header = ["path", "patient_id", "Edema", "text", "note"]
    rows = [[f"{i}.png", f"p{i // 4}", i % 2, "Clear.", "n"] for i in range(80)]
    table = tmp_path / "table.csv"
    write_table(table, [header, *rows])
    (tmp_path / "in").mkdir()
    options = ["--table", str(table), "--missing", "keep"]
    assert "column 'note' must be 1, 0, -1 or empty" in prepare("folder", *options)
    prepare("folder", *options, "--ignore_columns", "[note]")
    found = {split: manifest(tmp_path / "out", split) for split in ("train", "val", "test")}
    assert sum(map(len, found.values())) == 80
    groups = [{row["patient_id"] for row in rows} for rows in found.values()]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 20
    assert (found["train"][0]["text"], found["train"][0]["id"]) == ("Clear.", found["train"][0]["filepath"])


def test_folder_of_images_alone(prepare: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "in/sub").mkdir(parents=True)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "in/sub/a.PNG")
    (tmp_path / "in/notes.txt").write_text("x")
    shown = prepare("folder")
    assert manifest(tmp_path / "out", "test") == [{"id": "sub/a.PNG", "filepath": "sub/a.PNG"}]
    assert "1 × not an image" in shown
    assert not (tmp_path / "out/classes.txt").exists()


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("path,Edema", "/a.png,1", "table.csv:2: column 'path'"),
        ("path,Edema", "../a.png,1", "table.csv:2: column 'path'"),
        ("path,Edema,split", "a.png,1,dev", "table.csv:2: column 'split'"),
        ("path,Edema", "a.png,1,0", "table.csv:2: 3 cells"),
        ("path,Edema", "a.png,2", "table.csv:2: column 'Edema'"),
        ("path,Edema,Edema", "a.png,1,0", "class name 'Edema' stands twice"),
        ("file,Edema", "a.png,1", "has no column 'path'"),
        ("path,path,Edema", "a.png,b.png,1", "has two columns 'path'"),
        ("path,Edema,split,patient_id", "a.png,1,train,p\nb.png,1,test,p", "1 patients are in two splits"),
        ("path,Edema", '"a.png,1', "not a CSV table"),
    ],
)
def test_mistakes_in_a_table(prepare: Callable[..., str], tmp_path: Path, header: str, row: str, message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "table.csv").write_text(f"{header}\n{row}\n")
    assert message in prepare("folder", "--table", str(tmp_path / "table.csv"), "--missing", "keep")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source", ""], "source: is required"),
        (["--source", "nowhere"], "source: nowhere is no folder"),
        (["--image_root", "nowhere"], "image_root: "),
        (["--val_fraction", "0.9"], "val_fraction: together"),
        (["--test_fraction", "2"], "test_fraction: "),
        (["--salt", ""], "salt: "),
        (["--table", "nowhere.csv"], "nowhere.csv: "),
        (["--table", "bad.csv.gz"], "bad.csv.gz: a broken gzip file"),
        (["--table", "latin.csv"], "latin.csv: not UTF-8"),
        ([], "no row is left"),
    ],
)
def test_mistakes_in_settings(
    prepare: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "bad.csv.gz").write_bytes(gzip.compress(b"path,Edema\na.png,1\n")[:-6])
    (tmp_path / "latin.csv").write_bytes(b"path,\xd6dem\n")
    assert message in prepare("folder", *options)


def test_the_hash_split_is_stable() -> None:
    """Splits that people publish must not change."""
    fractions = {"test": 0.2, "val": 0.1}
    splits = [split_by_hash(f"patient{number}", 0, fractions) for number in range(40)]
    assert [number for number, split in enumerate(splits) if split == "val"] == [5, 39]
    assert [number for number, split in enumerate(splits) if split == "test"] == [7, 9, 11, 12, 14, 15, 21, 22, 38]
    assert all(split_by_hash(str(number), 0, {"test": 1.0, "val": 0.0}) == "test" for number in range(100))


def test_a_film_under_two_spellings_is_one_row(
    prepare: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Dots, doubled slashes, backslashes, composed and decomposed accents, links; the first row is kept."""
    folder = tmp_path / "in"
    (folder / "s").mkdir(parents=True)
    accent = "caf\u00e9.png"
    for name in ("a.png", "s/b.png", unicodedata.normalize("NFD", accent)):
        Image.new("L", (16, 16)).save(folder / name)
    (folder / "link.png").symlink_to("a.png")
    Image.new("L", (16, 16)).save(folder / "._a.png")
    rows = [
        ("a.png", "train"),
        ("./a.png", "test"),
        ("link.png", "val"),
        ("s/b.png", "train"),
        ("s//b.png", "test"),
        (".\\s\\b.png", "val"),
        (accent, "train"),
        (unicodedata.normalize("NFD", accent), "test"),
    ]
    write_table(folder / "t.csv", [["path", "split", "Edema"], *([path, split, "1"] for path, split in rows)])
    shown = prepare("folder", "--table", str(folder / "t.csv"), "--pixel_samples", "0")
    found = manifest(tmp_path / "out", "train")
    assert [row["id"] for row in found] == ["a.png", "s/b.png", accent]
    assert not (tmp_path / "out/test.jsonl").exists()
    assert not (tmp_path / "out/val.jsonl").exists()
    assert shown.count("duplicate row") >= 2
    assert all((folder / row["filepath"]).is_file() for row in found)
    prepare("folder", "--pixel_samples", "0", output="alone")  # no table: what macOS leaves is no image
    assert "._a.png" not in [row["id"] for row in manifest(tmp_path / "alone", "test")]
    lines = "".join(
        json.dumps({"id": name, "filepath": path}) + "\n" for name, path in (("1", "a.png"), ("2", "link.png"))
    )
    (folder / "two.jsonl").write_text(lines)
    load_manifest(folder / "two.jsonl", need="image")
    assert "two.jsonl: 1 lines hold a file that an earlier line has under another id" in caplog.text

"""Phantom radiographs: reproducible bytes, labels that say what was drawn, vocabularies of every size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspg.engine.cli import main
from pspg.engine.data.manifest import load_manifest
from pspg.engine.data.phantoms.dataset import (
    PhantomConfig,
    check_phantoms,
    contact_sheet,
    read_findings,
    write_phantoms,
)
from pspg.engine.data.phantoms.drawing import CHANGES, DRAWINGS, draw_radiograph
from pspg.engine.data.phantoms.report import write_report
from pspg.engine.data.phantoms.vocabulary import (
    ALL_NAMES,
    KIND,
    KINDS,
    Finding,
    draw_findings,
    label_row,
    make_vocabulary,
)
from pspg.engine.utils.errors import UserError

SMALL = PhantomConfig(train=80, val=5, test=9, image_size=32, classes=52, seed=3)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "films"
    write_phantoms(SMALL, folder, workers=1)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_same_bytes_with_more_workers(phantoms: Path, tmp_path: Path) -> None:
    write_phantoms(SMALL, tmp_path / "again", workers=2)  # 94 images: two chunks, so two processes
    assert contents(tmp_path / "again") == contents(phantoms)
    assert [p.name for p in tmp_path.iterdir()] == ["again"]  # no partial folder is left


def test_an_image_depends_on_seed_and_index_only(phantoms: Path, tmp_path: Path) -> None:
    write_phantoms(PhantomConfig(**{**vars(SMALL), "train": 3}), tmp_path / "fewer", workers=1)
    write_phantoms(PhantomConfig(**{**vars(SMALL), "train": 3, "seed": 4}), tmp_path / "other", workers=1)
    for name in ("train-000002", "test-000008"):
        film = f"images/{name}.png"
        assert (tmp_path / "fewer" / film).read_bytes() == (phantoms / film).read_bytes()
        assert (tmp_path / "other" / film).read_bytes() != (phantoms / film).read_bytes()
    assert lines(tmp_path / "fewer" / "train.jsonl") == lines(phantoms / "train.jsonl")[:3]


def test_size_changes_neither_findings_nor_reports(phantoms: Path, tmp_path: Path) -> None:
    write_phantoms(PhantomConfig(**{**vars(SMALL), "image_size": 48, "train": 4}), tmp_path / "larger", workers=1)
    assert lines(tmp_path / "larger" / "val.jsonl") == lines(phantoms / "val.jsonl")
    small, large = (Image.open(f / "images/val-000001.png") for f in (phantoms, tmp_path / "larger"))
    shrunk = np.asarray(large.resize(small.size, Image.Resampling.BOX), float)
    assert np.corrcoef(shrunk.ravel(), np.asarray(small, float).ravel())[0, 1] > 0.97


def test_manifest_format(phantoms: Path) -> None:
    names = lines(phantoms / "classes.txt")
    assert len(names) == SMALL.classes
    ids: list[str] = []
    for split in ("train", "val", "test"):
        manifest = load_manifest(phantoms / f"{split}.jsonl", need="labels")
        assert manifest.label_names == names
        assert len(manifest.samples) == getattr(SMALL, split)
        ids += [sample.id for sample in manifest.samples]
        assert all(sample.text for sample in manifest.samples)
        with Image.open(manifest.samples[0].path) as film:
            assert (film.mode, film.size, film.format) == ("L", (32, 32), "PNG")
    assert len(set(ids)) == len(ids) == 94
    groups = [name for stem in ("seen", "unseen", "unseen_types") for name in lines(phantoms / f"{stem}.txt")]
    assert sorted(groups) == sorted(names)


def test_labels_say_what_the_findings_are(phantoms: Path) -> None:
    findings = read_findings(phantoms)
    names = lines(phantoms / "classes.txt")
    rows = [json.loads(line) for line in lines(phantoms / "train.jsonl")]
    assert sum(map(sum, (row["labels"] for row in rows))) > len(rows)
    for row in rows:
        labels = dict(zip(names, row["labels"], strict=True))
        shown = findings[row["id"]]
        assert labels["effusion"] == any(f.kind == "effusion" for f in shown)
        assert labels["large left effusion"] == (Finding("effusion", "left", None, "large") in shown)
        upper = [f for f in shown if (f.kind, f.side, f.zone) == ("nodule", "right", "upper")]
        assert labels["nodule in the right upper zone"] == bool(upper)
        assert labels["effusion"] >= labels["left effusion"] >= labels["large left effusion"]


def test_reports_affirm_what_is_shown_and_negate_only_what_is_not() -> None:
    kinds = make_vocabulary(108).kinds
    negated = 0
    for index in range(300):
        rng = np.random.default_rng(index)
        findings = draw_findings(kinds, rng)
        present = {f.kind for f in findings}
        report = write_report(findings, kinds, rng)
        affirmed = ""
        for sentence in report.lower().split("."):
            if sentence.strip().startswith(("no ", "neither ")) or "absent" in sentence:
                assert not any(kind in sentence for kind in present), report
                negated += 1
            else:
                affirmed += sentence
        assert all(kind in affirmed for kind in present), report
    assert negated > 100


@pytest.mark.parametrize("classes", [14, 28, 52, 108, 193, 400, len(ALL_NAMES)])
def test_vocabularies_are_unique_nested_and_covered(classes: int) -> None:
    vocabulary = make_vocabulary(classes)
    names = [name.name for name in vocabulary.names]
    assert len(set(names)) == len(names) == classes
    assert [len(g) > 0 for g in (vocabulary.seen, vocabulary.unseen, vocabulary.unseen_types)] == [True] * 3
    assert len(vocabulary.seen) + len(vocabulary.unseen) + len(vocabulary.unseen_types) == classes
    seen_parts = set().union(*(name.parts for name in vocabulary.seen))
    assert all(name.parts <= seen_parts and len(name.parts) > 1 for name in vocabulary.unseen)
    assert not set(vocabulary.unseen) & set(vocabulary.seen)
    assert not {n.kind for n in vocabulary.unseen_types} & {n.kind for n in vocabulary.seen + vocabulary.unseen}
    larger = make_vocabulary(min(classes + 40, len(ALL_NAMES)))
    for group in ("names", "seen", "unseen", "unseen_types"):
        mine = getattr(vocabulary, group)
        assert getattr(larger, group)[: len(mine)] == mine


def test_the_seen_names_of_the_demo_cover_every_side_zone_and_size() -> None:
    seen = make_vocabulary(PhantomConfig().classes).seen
    parts = set().union(*(name.parts for name in seen))
    assert {"left", "right", "upper", "middle", "lower", "small", "large", "mild", "severe"} <= parts
    assert {len(name.parts) for name in seen} == {1, 2, 3}


def test_every_demo_class_has_positives_and_negatives_and_kinds_come_together() -> None:
    config = PhantomConfig()
    vocabulary = make_vocabulary(config.classes)
    for split, films in enumerate((config.train, config.val, config.test)):
        shown = [
            draw_findings(vocabulary.kinds, np.random.default_rng([config.seed, split, i, 0]))
            for i in range(min(films, 600))
        ]
        labels = np.stack([label_row(vocabulary.names, findings) for findings in shown])
        prevalence = labels.mean(axis=0)
        assert prevalence.min() > 0.03
        assert prevalence.max() < 0.35
    column = {name.name: labels[:, i] for i, name in enumerate(vocabulary.names)}
    assert column["edema"][column["cardiomegaly"] == 1].mean() > 1.2 * column["edema"].mean()
    assert set(map(len, shown)) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.noun)
def test_every_kind_leaves_a_mark_where_its_side_says(kind) -> None:
    attributes = {a: next(iter(kind.options(a)), None) for a in ("side", "zone", "size")}
    finding = Finding(kind.noun, **attributes)  # left, upper, small
    assert (kind.noun in DRAWINGS) != (kind.noun in CHANGES)
    films = np.stack([[draw_radiograph(f, 64, np.random.default_rng(s)) for s in range(24)] for f in ([], [finding])])
    change = np.abs(films[1].mean(0, dtype=float) - films[0].mean(0, dtype=float))
    assert change.max() > 12
    if kind.sides and kind.noun not in ("central line", "pacemaker", "scoliosis"):  # those cross the midline
        assert finding.side == "left"  # the patient's left is on the image's right
        assert change[:, 34:].max() > 1.5 * change[:, :30].max()


def test_refuses_a_foreign_folder_and_reuses_its_own(phantoms: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO", logger="pspg")
    before = contents(phantoms)
    write_phantoms(SMALL, phantoms, workers=1)
    assert "already holds these phantoms; reused" in caplog.text
    with pytest.raises(UserError, match="another configuration"):
        write_phantoms(PhantomConfig(**{**vars(SMALL), "seed": 9}), phantoms)
    assert contents(phantoms) == before
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not a phantom data set"):
        write_phantoms(SMALL, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        write_phantoms(SMALL, tmp_path / "mine.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pspg.engine.data.phantoms.dataset.draw_radiograph", fail)
    with pytest.raises(OSError, match="disk full"):
        write_phantoms(SMALL, tmp_path / "films", workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"classes": 13}, {"classes": 9999}, {"image_size": 4}, {"seed": -1}, {"val": -1}])
def test_refuses_what_cannot_be_drawn(change: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        check_phantoms(PhantomConfig(**change))


def test_an_empty_split_is_told_with_what_follows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--train", "0", "--val", "2", "--test", "2", "--image_size", "32", "--output", str(tmp_path / "films")]
    assert main(["phantom", *words]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "train 0: train.jsonl is empty, so nothing can be trained on it"


def test_contact_sheet(phantoms: Path, tmp_path: Path) -> None:
    contact_sheet(phantoms, tmp_path / "sheet.png", split="val", columns=2, cell=64)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 2 * 72 + 8
        assert np.asarray(sheet).std() > 10
    with pytest.raises(UserError, match="not a phantom data set"):
        contact_sheet(tmp_path, tmp_path / "sheet.png")


def test_names_read_as_a_radiologist_would_say_them() -> None:
    assert Finding("effusion", "left", None, "large").name == "large left effusion"
    assert Finding("nodule", "right", "upper").name == "nodule in the right upper zone"
    assert Finding("nodule", None, "lower", "small").name == "small nodule in the lower zone"
    assert set(KIND["edema"].options("size")) == {"mild", "severe"}

"""Manifests: what loads, and the one line that each mistake gets."""

import json
from pathlib import Path

import pytest

from pspg.engine.data.manifest import load_label_names, load_manifest
from pspg.engine.utils.errors import UserError

NAMES = ["Mass", "Edema", "Normal"]


def row(**changes):
    return {"id": "a", "filepath": "images/a.png", "text": "clear", "labels": [1, 0, -1]} | changes


@pytest.fixture
def write(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "classes.txt").write_text("Mass \n Edema\nNormal\n\n", encoding="utf-8-sig")

    def write(*rows):
        path = tmp_path / "train.jsonl"
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
        return path

    return write


def test_lists_and_objects_give_the_same_labels(write):
    named = {" Edema ": 0, "Mass": 1.0}
    path = write(row(labels=[1, 0, None]), "", row(id=7, labels=named, patient_id=12, filepath="./images//b.png"))
    manifest = load_manifest(path, need="labels")
    first, second = manifest.samples
    assert manifest.label_names == NAMES
    assert first.labels == second.labels == (1.0, 0.0, None)
    assert (second.id, second.patient, first.patient) == ("7", "12", None)
    assert second.path == (path.parent / "images/b.png").resolve()


def test_labels_are_left_alone_where_not_needed(write):
    path = write(row(labels=[1]), row(id="b", labels=None, text=None))
    assert [sample.labels for sample in load_manifest(path, need="image").samples] == [None, None]


def test_line_separators_inside_strings_do_not_split_lines(write):
    path = write(json.dumps(row(text="one\u2028two\x85three"), ensure_ascii=False))
    assert load_manifest(path, need="text").samples[0].text == "one\u2028two\x85three"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "not JSON"),
        ('["a"]', "JSON object"),
        ("[" * 100_000, "not JSON"),
        (row(id="a"), "id 'a' is already on line 1"),
        (row(id=""), "needs 'id'"),
        (row(id=True), "needs 'id'"),
        (row(id="b\nc"), "control character"),
        (row(id="b", filepath=None), "needs 'filepath'"),
        (row(id="b", filepath=3), "needs 'filepath'"),
        (row(id="b", filepath="/etc/passwd"), "absolute"),
        (row(id="b", filepath="images/../../x.png"), "'..'"),
        (row(id="b", filepath="."), "empty"),
        (row(id="b", filepath="C:\\images\\a.png"), "absolute"),
        (row(id="b", filepath="d:/a.png"), "absolute"),
        (row(id="b", filepath="\\\\server\\images\\a.png"), "absolute"),
        (row(id="b", filepath="images\\..\\..\\x.png"), "'..'"),
        (row(id="b", filepath="a\0.png"), "control character"),
        (row(id="b", labels=[1, 0]), "2 values, the label names are 3"),
        (row(id="b", labels=[1, 0, 2]), "label of 'Normal'"),
        (row(id="b", labels=[1, [], 0]), "label of 'Edema'"),
        (row(id="b", labels=[float("nan"), 0, 0]), "label of 'Mass'"),
        (row(id="b", labels=["1", 0, 0]), "label of 'Mass'"),
        (row(id="b", labels={"Oedema": 1}), "did you mean 'Edema'?"),
        (row(id="b", labels={"Mass": 1, " Mass": 0}), "twice"),
        (row(id="b", labels=None), "needs 'labels'"),
        (row(id="b", filepath="d/" * 3000 + "x.png"), "longer than 1000 characters"),
        (row(id="b", filepath="a" * 5000), "longer than 1000 characters"),
        ('{"id": "b", "filepath": "a.png", "filepath": "c.png", "labels": [1, 0, 0]}', "'filepath' is given twice"),
        ('{"id": "b", "filepath": "a.png", "labels": {"Mass": 1, "Mass": 0}}', "'Mass' is given twice"),
    ],
)
def test_each_mistake_is_one_line_with_file_and_line(write, bad, reason):
    path = write(row(), bad)
    with pytest.raises(UserError) as caught:
        load_manifest(path, need="labels")
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("text", [None, "", " \n", 5])
def test_phase_1_needs_text(write, text):
    path = write(row(), row(id="b", text=text))
    with pytest.raises(UserError, match=r"jsonl:2: .*text"):
        load_manifest(path, need="text")
    assert len(load_manifest(path, need="labels").samples) == 2


@pytest.mark.parametrize("link", ["images/out.png", "out/x.png"])
def test_links_must_stay_inside(write, tmp_path_factory, link):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "x.png").touch()
    path = write(row(), row(id="b", filepath=link))
    (path.parent / "images/out.png").symlink_to(outside / "x.png")
    (path.parent / "out").symlink_to(outside)
    with pytest.raises(UserError, match=r":2: .*through a link"):
        load_manifest(path, need="labels")


def test_links_within_the_root_and_a_linked_root_are_fine(write, tmp_path):
    path = write(row(filepath="b.png"))
    (tmp_path / "images/a.png").touch()
    (tmp_path / "images/b.png").symlink_to("a.png")
    (tmp_path / "root").symlink_to("images")
    sample = load_manifest(path, image_root=tmp_path / "root", need="labels").samples[0]
    assert sample.path == (tmp_path / "images/a.png").resolve()


def test_mistakes_of_whole_files(write, tmp_path):
    path = write("", "")
    with pytest.raises(UserError, match="empty"):
        load_manifest(path, need="image")
    with pytest.raises(UserError, match="no such file"):
        load_manifest(tmp_path / "none.jsonl", need="image")
    with pytest.raises(UserError, match="cannot be read"):
        load_manifest(tmp_path, need="image")
    with pytest.raises(UserError, match="no such folder"):
        load_manifest(path, image_root=tmp_path / "none", need="image")
    path.write_bytes(b'{"id": "a", "filepath": "a"}\n\xff\xfe\n')
    with pytest.raises(UserError, match=":2: not UTF-8"):
        load_manifest(path, need="image")
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"classes\.txt.*label_names"):
        load_manifest(write(row()), need="labels")
    for lines in ([], ["", " ", "\t"]):  # not that classes.txt is missing, which the next command would tell, too
        with pytest.raises(UserError, match=r"train\.jsonl: the manifest is empty"):
            load_manifest(write(*lines), need="labels")


@pytest.mark.parametrize(
    ("text", "reason"), [("", "no class names"), ("A\n\nB\n", ":2: empty"), ("A\nB\n A\n", ":3: .*on line 1")]
)
def test_label_name_mistakes(tmp_path, text, reason):
    path = Path(tmp_path / "names.txt")
    path.write_text(text)
    with pytest.raises(UserError, match=reason):
        load_label_names(path)


def test_backslashes_are_slashes_unless_a_file_has_them(write, tmp_path):
    (tmp_path / "images/a.png").touch()
    (tmp_path / "a\\b.png").touch()
    path = write(
        row(filepath="images\\a.png"), row(id="b", filepath="a\\b.png"), row(id="c", filepath=".\\images\\\\c.png")
    )
    first, second, third = load_manifest(path, need="labels").samples
    assert first.path == (tmp_path / "images/a.png").resolve()
    assert second.path == (tmp_path / "a\\b.png").resolve()
    assert third.path == (tmp_path / "images/c.png").resolve()


def test_a_file_under_two_ids_is_told_with_both_lines(write, caplog):
    (link := write(row()).parent / "images/link.png").symlink_to("a.png")
    path = write(row(), "", row(id="b", filepath="images//./a.png"), row(id="c", filepath=f"images/{link.name}"))
    assert len(load_manifest(path, need="labels").samples) == 3
    (line,) = caplog.messages
    assert line.startswith(f"{path}: 2 lines hold a file that an earlier line has under another id")
    assert line.endswith("the first 'a.png' ('a' of line 1 and 'b' of line 3)")

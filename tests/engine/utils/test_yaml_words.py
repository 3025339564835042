"""Keys given twice, and words that YAML takes for values of other types."""

import pytest
import yaml

from pspg.engine.cli import parse
from pspg.engine.utils.errors import UserError
from pspg.engine.utils.yaml_words import check_keys, plain_words

TWICE = {
    "a key": "seed: 1\nbatch_size: 8\nseed: 2\n",
    "a group": "optim:\n  lr: 0.01\ndata: {train: a}\noptim:\n  accumulate: 2\n",
    "in a group": "optim:\n  lr: 1\n  lr: 2\n",
    "flow": "optim: {lr: 1, lr: 2}",
    "dotted": "optim.lr: 1\noptim: {lr: 2}\n",
    "quoted": 'seed: 1\n"seed": 2\n',
    "in a list": "rows:\n- {name: a}\n- {name: b, name: c}\n",
    "deep": "a: {b: {c: {d: 1, e: 2, d: 3}}}",
    "after an alias": "a: &x 1\nb: *x\na: 2\n",
    "alike": "seed: 1\nseed: 1\n",
}


@pytest.mark.parametrize("kind", TWICE)
def test_a_key_given_twice_is_named_with_its_line(kind):
    with pytest.raises(yaml.YAMLError, match=r"^\S+ is given twice; keep one of them\n.*line \d+"):
        check_keys(TWICE[kind])


@pytest.mark.parametrize(
    "text",
    [
        "rows: [{name: a}, {name: b}]",
        "a: {x: 1}\nb: {x: 1}\n",
        "a: [x, x]",
        "- {x: 1}\n- {x: 1}",
        "a: &g {x: 1}\nb: *g\nc:\n  <<: *g\n  x: 2\n",
        "[[{a: 1}], {a: 1}]",
        "a.b: 1\na: {c: 2}",
        "a: a\n",
        "",
        "? [1, 2]\n: x\n? [1, 3]\n: y\n",
    ],
)
def test_what_is_given_once(text):
    check_keys(text)


def test_words_stay_words_and_values_stay_values():
    text = (
        "class_lists: {1: a.txt, no: b}\nflag: no\nrate: 1.5\nnames: [no, ON, 1, 007, ~, 1.0, 'x', 2020-01-01, [yes]]\n"
    )
    assert yaml.safe_load(plain_words(text)) == {
        "class_lists": {"1": "a.txt", "no": "b"},
        "flag": False,
        "rate": 1.5,
        "names": ["no", "ON", "1", "007", "~", "1.0", "x", "2020-01-01", ["yes"]],
    }
    assert plain_words("seed: 1") == "seed: 1"


NAMES = ["no", "on", "1", "NO", "off", "null", "1.0", "No Finding"]


def test_class_names_on_the_command_line_and_in_a_file(tmp_path):
    file = tmp_path / "a.yaml"
    for text in (f"class_names: [{', '.join(NAMES)}]\n", "class_names:\n" + "".join(f"- {name}\n" for name in NAMES)):
        file.write_text(text + "batch_size: 3\n")
        settings = parse(["predict", "--config", str(file)])[1]
        assert (settings.class_names, settings.batch_size) == (NAMES, 3)
    assert parse(["predict", "--class_names", f"[{', '.join(NAMES)}]"])[1].class_names == NAMES
    assert parse(["predict", "--class_names", "[1]"])[1].class_names == ["1"]
    assert parse(["predict", "--class_names", '["1", "no"]'])[1].class_names == ["1", "no"]
    train = parse(["train", "--data.class_names", "[no, 1]", "--data.augment", "no"])[1]
    assert (train.data.class_names, train.data.augment) == (["no", "1"], False)


def test_numbers_in_lists_of_a_study(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("seeds: [0, 12]\nrows:\n- name: a\n  quoted: {x: [81.5, 2]}\n")
    study = parse(["study", "--config", str(file)])[1]
    assert study.seeds == [0, 12]
    assert study.rows[0].quoted == {"x": [81.5, 2.0]}


@pytest.mark.parametrize("kind", ["a key", "a group"])
def test_a_file_with_a_key_twice_is_one_line(tmp_path, kind):
    (tmp_path / "a.yaml").write_text(TWICE[kind])
    with pytest.raises(
        UserError, match=r"a\.yaml:[34]: not readable as YAML \((seed|optim) is given twice; keep"
    ) as caught:
        parse(["train", "--config", str(tmp_path / "a.yaml")])
    assert "\n" not in str(caught.value)

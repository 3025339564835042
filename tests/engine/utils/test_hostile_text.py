"""Documents, YAML and text from anybody: a value, or one line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml

from pspg.engine.utils.documents import Within, as_schema, parse_json, read_json
from pspg.engine.utils.errors import UserError
from pspg.engine.utils.names import base_name, data_name, named
from pspg.engine.utils.tables import write_csv
from pspg.engine.utils.templates import html_templates, markdown_templates
from pspg.engine.utils.text import printable
from pspg.engine.utils.yaml_text import bounded

NASTY = ["\x1b[31m", "\x07", "a\nb", "\x00", "\x9b31m", "\u202eevil", "\u2066x", "\u2028", "\x7f", "\ud800", "\ufeff"]


@pytest.mark.parametrize("text", NASTY)
def test_every_border_shows_it_as_an_escape(tmp_path: Path, text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert "\\" in shown
    write_csv(tmp_path / "a.csv", [text], [[text]])
    assert (tmp_path / "a.csv").read_text() == f"{shown}\n{shown}\n"
    for make, name in ((html_templates, "a.html"), (markdown_templates, "a.md")):
        (tmp_path / name).write_text("{{ x }}")
        rendered = make(tmp_path).get_template(name).render(x=text)
        assert rendered.isprintable(), repr(rendered)


@pytest.mark.parametrize("text", ["Größe", "肺炎", "pleural effusion – left", "نیم\u200cفاصله", "a b"])
def test_words_stay_as_they_are(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "NaN", "-Infinity", "{", "", "\x00", '{"a": 1e}'])
def test_bad_json_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"key: .*a\.json: not readable as JSON"):
        read_json(tmp_path / "a.json", "key")


@dataclass
class Part:
    sizes: list[Annotated[int, Within(1, 9)]]
    name: str | None = None


@dataclass
class Whole:
    part: Part
    share: Annotated[float, Within(0, 1)] = 0.5
    on: bool = False


@pytest.mark.parametrize(
    ("document", "key"),
    [
        ([], "it must be an object"),
        ({}, "part is missing"),
        ({"part": 1}, "part must be an object"),
        ({"part": {"sizes": [1, 10]}}, r"part\.sizes\[1\]"),
        ({"part": {"sizes": [True]}}, r"part\.sizes\[0\]"),
        ({"part": {"sizes": [1.0]}}, r"part\.sizes\[0\]"),
        ({"part": {"sizes": [10**400]}}, r"part\.sizes\[0\]"),
        ({"part": {"sizes": [], "name": 3}}, r"part\.name must be a text"),
        ({"part": {"sizes": []}, "share": 1.5}, "share must be a number from 0 to 1"),
        ({"part": {"sizes": []}, "share": "1"}, "share"),
        ({"part": {"sizes": []}, "on": 1}, "on must be true or false"),
    ],
)
def test_a_schema_names_the_key(document: Any, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        as_schema(Whole, document)


def test_a_schema_takes_what_fits_and_ignores_the_rest() -> None:
    found = as_schema(Whole, json.loads('{"part": {"sizes": [1, 9], "more": 1}, "share": 1}'))
    assert found == Whole(Part([1, 9]), 1.0)


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "a: &a [*a]",
        "seed: " + "9" * 5000,
        "seed: !!int x",
        "a: !!python/object/apply:os.system [ls]",
        "[" * 1000,
        "{? [a] : b}",
        "a: 2001-99-99",
        "a: \x00",
    ],
)
def test_hostile_yaml_is_refused_at_once(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        bounded(yaml.safe_load)(text)


def test_yaml_with_anchors_is_read() -> None:
    assert bounded(yaml.safe_load)("a: &a {x: 1}\nb: [*a, *a]") == {"a": {"x": 1}, "b": [{"x": 1}, {"x": 1}]}


def test_names_leave_their_places_behind(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("x")
    assert data_name(file) == "train.jsonl (sha256 2d711642b726b044)"
    assert named({"a": [str(file)], "b": "/gone/away.csv", "c": "ViT-B/32", "d": 3}) == {
        "a": [data_name(file)],
        "b": "away.csv",
        "c": "ViT-B/32",
        "d": 3,
    }
    assert [base_name(name) for name in ("RN50", "hf-hub:a/b", "runs/one", "/x/clip.json")] == [
        *("RN50", "hf-hub:a/b"),
        *("one", "clip.json"),
    ]

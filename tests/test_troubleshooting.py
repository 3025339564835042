"""The page of likely messages quotes them as the code has them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "TROUBLESHOOTING.md"
ROWS = re.findall(r"^\| `(.+?)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE)


def quoted(node: ast.AST) -> str | None:
    """A string of the source with … for what is put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sd]|\{:\w*\}", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(quoted(part) or "…" for part in node.values)
    return None


@pytest.fixture(scope="module")
def strings() -> list[str]:
    trees = (ast.parse(path.read_text()) for path in (ROOT / "engine").rglob("*.py"))
    return [text for tree in trees for node in ast.walk(tree) if (text := quoted(node))]


def test_there_are_twenty() -> None:
    assert len(ROWS) >= 20
    assert len({message for message, _ in ROWS}) == len(ROWS)


@pytest.mark.parametrize("message", [message for message, _ in ROWS])
def test_a_message_stands_in_the_code(strings: list[str], message: str) -> None:
    # What is put in may hold several parts: f"{path}:{number}" is …:….
    wanted = re.compile(".*".join(map(re.escape, message.split("…"))))
    assert any(wanted.search(text) for text in strings), f"no message of engine/ reads {message!r}"


def test_settings_on_the_page_exist() -> None:
    """Dotted names and options in the right-hand column."""
    from pspg.engine.cli import COMMANDS, make_parser

    _, parsers = make_parser(tuple(COMMANDS.items()))
    keys = {action.dest for parser in parsers.values() for action in parser._actions}
    meanings = " ".join(meaning for _, meaning in ROWS)
    named = re.findall(r"--([a-z_.]+[a-z])", re.sub(r"docker run --[a-z-]+|--gpus all", "", meanings))
    named += re.findall(r"`((?:data|loss|model|optim)\.\w+)", meanings)
    assert len(named) > 20
    assert not set(named) - keys

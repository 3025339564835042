"""What the command line shows when it is asked: help, examples, completion."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from pspg.engine.cli import COMMANDS, Command, main, make_parser, parse
from pspg.engine.utils.help import plain_type

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_every_setting(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    file = "FILE" if COMMANDS[command].needs_file else "[FILE]"
    assert text.startswith(f"usage: pspg-engine {command} {file} [--key VALUE ...]")
    settings = COMMANDS[command].load(COMMANDS[command].settings)
    for field in dataclasses.fields(settings):
        assert f"--{field.name}" in text
    assert "(type:" in text
    assert not re.search(r"Union\[|Optional\[|Literal\[|typing|<class", text)
    assert not re.search(r"default:\s*(?:True|False)?\)", text)
    assert not re.search(r"type:[^)]*(?:Interval|Int\b|Float\b|Seed|Depth|Below)", text)


@pytest.mark.parametrize("command", [name for name in COMMANDS if COMMANDS[name].example])
def test_the_example_of_a_command_is_valid(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS[0].parents[1])
    name, config = parse([*command.split(), *str(COMMANDS[command].example).split()])
    assert name == command
    assert config.checkpoint if command == "calibrate" else config.output  # it writes to the model


def test_shells_complete_commands_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--print_completion", "shtab-bash"])
    make_parser.cache_clear()  # it is of no use after that
    script = capsys.readouterr().out
    assert "--optim.lr" in script
    assert "import-checkpoint" in script


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Optional[Literal['a', 'b']]", "{a, b} | null"),
        ("Union[str, list[str], null]", "str | list[str] | null"),
        ("Union[Literal['a', 'b'], list[Literal['a', 'b']]]", "{a, b} | list[{a, b}]"),
        ("dict[str, int | null]", "dict[str, int | null]"),
        ("PositiveInt | null", "int > 0 | null"),
        ("Optional[list[ClosedUnitInterval]]", "list[float from 0 to 1] | null"),
    ],
)
def test_types_are_shown_as_alternatives(text: str, shown: str) -> None:
    assert plain_type(text) == shown


def test_commands_of_two_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A key with a space is all that it takes."""
    export = COMMANDS["export-checkpoint"]
    monkeypatch.setitem(COMMANDS, "prepare this", Command(export.settings, export.function, "first help"))
    monkeypatch.setitem(COMMANDS, "prepare that", Command(export.settings, export.function, "second help"))
    name, config = parse(["prepare", "that", "--output", "x"])
    assert (name, config.output) == ("prepare that", "x")
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: pspg-engine prepare COMMAND")
    assert "first help" in text
    assert "second help" in text
    for arguments, start in [
        (["prepare", "this", "--nope", "1"], "pspg-engine prepare this: error: "),
        (["prepare", "this"], "pspg-engine prepare this: error: checkpoint: "),
        (["prepare", "other"], "pspg-engine prepare: error: "),
        (["prepare"], "pspg-engine prepare: error: "),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(start)
        assert error.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["prepare", "check"], ["train"], ["predict"]])
def test_help_says_what_each_exit_status_means(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Exit status: 0, all was done, with on_bad_image skip also where images were left out" in shown
    assert "prepare check found images that cannot be used; 3, all was done, and a damaged checkpoint" in shown

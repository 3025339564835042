"""Every command says what it does."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for path in (ROOT / "benchmarks").rglob("*.py") if "ArgumentParser(" in path.read_text()]
COMMANDS = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    main = import_module(command).main
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {command.removesuffix('.__main__')} ")


def test_all_commands_are_found() -> None:
    assert {"benchmarks.compare", "benchmarks.model.__main__", "benchmarks.run"} <= set(COMMANDS)

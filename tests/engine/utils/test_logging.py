"""Messages go where a program sends them; the command line shows them on standard error."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from pspg.engine.cli import main
from pspg.engine.utils.logging import AboveProgressBars


def test_a_library_user_routes_messages_and_hears_nothing_else() -> None:
    script = """
import io, logging
from pspg.engine.training.telemetry import LoaderWatch
quiet = LoaderWatch("advice")
quiet.LIMIT = -1.0
quiet.share(0.0)
heard = io.StringIO()
logging.getLogger("pspg").addHandler(logging.StreamHandler(heard))
logging.getLogger("pspg").setLevel(logging.INFO)
told = LoaderWatch("advice")
told.LIMIT = -1.0
told.share(0.0)
assert heard.getvalue().count("the loader is the bottleneck") == 1, heard.getvalue()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_the_command_line_shows_each_message_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["train", "--batch_size", "0"]) == 2
        assert capsys.readouterr().err == "pspg-engine train: error: batch_size: must be > 0, got 0\n"
    assert len(logging.getLogger("pspg").handlers) == 1


@pytest.mark.parametrize(("rank", "shown"), [("0", ["told", "warned", "failed"]), ("1", ["failed"])])
def test_of_several_processes_the_first_tells_what_all_meet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, shown: list[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    logger = logging.Logger("ranks")
    logger.addHandler(AboveProgressBars())
    logger.info("told")
    logger.warning("warned")
    logger.error("failed")
    assert capsys.readouterr().err.split() == shown

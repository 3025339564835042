"""The Dockerfile, as far as it can be checked without Docker: what it copies, and that its shell lines are such."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.test_packaging import PACKAGES

ROOT = Path(__file__).parents[1]
KNOWN = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "WORKDIR"}


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each, continued lines joined."""
    lines = (line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name, arguments.strip()) for name, _, arguments in found]


def copied() -> list[str]:
    return [source for name, arguments in instructions() if name == "COPY" for source in arguments.split()[:-1]]


def test_it_begins_with_an_image_and_uses_known_instructions() -> None:
    names = [name for name, _ in instructions()]
    assert names[0] == "FROM"
    assert set(names) == KNOWN
    image = instructions()[0][1]
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    version = re.fullmatch(r"python:(\d+\.\d+)-slim", image)
    assert version is not None
    assert tuple(map(int, version[1].split("."))) >= tuple(map(int, oldest.split(".")))


def test_it_copies_what_a_wheel_is_built_of() -> None:
    """The files and folders that the wheel of the packaging tests is built of, which tests install and run."""
    assert set(copied()) == {*PACKAGES, "pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
    assert all((ROOT / source).exists() for source in copied())


def test_nothing_that_it_copies_is_ignored() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignored[0] == "*"
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert kept == set(copied())
    assert not any(fnmatch(source, line) for source in copied() for line in ignored[1:] if not line.startswith("!"))


def test_its_extra_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    defaults = dict(arguments.split("=", 1) for name, arguments in instructions() if name == "ARG")
    assert defaults["EXTRAS"] in project["optional-dependencies"]
    (entry,) = (json.loads(arguments) for name, arguments in instructions() if name == "ENTRYPOINT")
    assert set(entry) <= set(project["scripts"])


@pytest.mark.parametrize("index", ["", "https://download.pytorch.org/whl/cpu"])
def test_its_commands_are_shell(index: str) -> None:
    commands = [arguments for name, arguments in instructions() if name == "RUN"]
    for command in commands:
        subprocess.run(["sh", "-n", "-c", command], check=True)
    (install,) = (command for command in commands if command.startswith("pip "))
    shown = subprocess.run(
        ["sh", "-c", install.replace("pip", "echo", 1)],
        env={"TORCH": index, "EXTRAS": "dicom", "PATH": "/usr/bin:/bin"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    where = f"--index-url {index} --extra-index-url https://pypi.org/simple " if index else ""
    assert shown == f"install --no-cache-dir {where}--constraint constraints.txt .[dicom]\n"

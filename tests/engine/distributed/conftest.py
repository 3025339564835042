"""Processes that a test starts and leaves none of behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

Spawn = Callable[[Sequence[object], Mapping[str, object]], subprocess.Popen[str]]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start a command with variables beside those of this process, in a process group of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(command: Sequence[object], variables: Mapping[str, object]) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [str(part) for part in command],
                env={**os.environ, **{key: str(value) for key, value in variables.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

"""Whole processes that do not find their ranks, or find those of another run: one line each, and nothing is left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.distributed.conftest import Spawn

PATIENCE = 3
"""timeout_s of the runs"""
Train = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def train(settings: Callable[[str], list[str]], spawn: Spawn) -> Train:
    """Function that starts a rank of a training into a folder."""

    def start(output: Path, port: int, rank: int, patience: int = PATIENCE) -> subprocess.Popen[str]:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        more = ["--output", output, "--timeout_s", patience, "--optim.epochs", 1]
        return spawn([sys.executable, "-m", "pspg.engine", *settings("contrastive"), *more], place)

    return start


def refused(process: subprocess.Popen[str]) -> str:
    """What a rank says that ends with a user's mistake and leaves no process."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output[-3000:]
    (line,) = output.splitlines()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return line.removeprefix("pspg-engine train: error: ")


@pytest.mark.slow
def test_port_of_a_program_that_says_nothing(tmp_path: Path, train: Train) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        first, second = (refused(process) for process in [train(tmp_path / "run", port, rank) for rank in (0, 1)])
    assert first == f"rank 0: MASTER_PORT: port {port} is in use on this machine; choose another"
    assert second.startswith(f"rank 1: MASTER_ADDR: 127.0.0.1:{port} takes connections and does not answer within 3 s")


@pytest.mark.slow
def test_rank_that_never_comes(tmp_path: Path, train: Train, free_port: int) -> None:
    line = refused(train(tmp_path / "run", free_port, 0))
    assert line == f"rank 0: rank 1 of 2 did not come to 127.0.0.1:{free_port} within {PATIENCE} s (timeout_s)"


@pytest.mark.slow
def test_two_runs_at_one_port(tmp_path: Path, train: Train, free_port: int) -> None:
    """The first goes on undisturbed, the ranks of the second are refused."""
    first = [train(tmp_path / "a", free_port, 0, patience=200)]
    until = time.monotonic() + 120
    while socket.socket().connect_ex(("127.0.0.1", free_port)):
        assert time.monotonic() < until
        time.sleep(0.1)
    lines = [refused(process) for process in [train(tmp_path / "b", free_port, rank) for rank in (0, 1)]]
    first.append(train(tmp_path / "a", free_port, 1, patience=200))
    assert lines[0] == f"rank 0: MASTER_PORT: port {free_port} is in use on this machine; choose another"
    assert lines[1].startswith(f"rank 1: MASTER_PORT: 127.0.0.1:{free_port} serves another run: 2 ranks, cpu, train ")
    for process in first:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output[-3000:]


MET = """
import os
from pspg.engine.distributed.launcher import launcher_environment, rendezvous
from pspg.engine.distributed.world import start
from pspg.engine.utils.errors import UserError
if os.environ["RANK"] == "1":
    rendezvous(launcher_environment(), 60, ["cpu", "a"])
    os._exit(0)
try:
    start("cpu", 4, run=["a"])
except UserError as error:
    print(error.local, error, flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_rank_that_is_lost_before_the_ranks_are_connected(ranks: Callable[..., list[subprocess.Popen[str]]]) -> None:
    """No watch is running then: the others wait for as long as the settings say, and no longer."""
    other, lost = ranks(["-c", MET], 2)
    lost.communicate(timeout=200)
    output, _ = other.communicate(timeout=4 + 20)
    said = "True rank 1 of 2 came and was lost before the ranks were connected within 4 s (timeout_s)"
    assert output.splitlines() == [said]

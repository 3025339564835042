"""The environment that launchers set, and ranks that do not find each other: one line each."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from pspg.engine.cli import main
from pspg.engine.distributed import world
from pspg.engine.distributed.launcher import RankInfo, launcher_environment, rendezvous
from pspg.engine.utils import device
from pspg.engine.utils.errors import UserError

TORCHRUN = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "29500",
}


def without(*keys: str, **changed: str) -> dict[str, str]:
    return {key: value for key, value in {**TORCHRUN, **changed}.items() if key not in keys}


def test_launchers_are_understood() -> None:
    assert launcher_environment({}) is None
    assert launcher_environment({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}) is None
    assert launcher_environment(TORCHRUN) == RankInfo(9, 16, 1, 8, "node-a", 29500)
    deepspeed = without("LOCAL_WORLD_SIZE", LOCAL_SIZE="4", CROSS_RANK="1", CROSS_SIZE="4")
    assert launcher_environment(deepspeed) == RankInfo(9, 16, 1, 4, "node-a", 29500)
    assert launcher_environment({**TORCHRUN, "SLURM_STEP_NUM_TASKS": "2"}) == RankInfo(9, 16, 1, 8, "node-a", 29500)


@pytest.mark.parametrize(
    ("environment", "start"),
    [
        (without("MASTER_ADDR"), "MASTER_ADDR: is not set, though WORLD_SIZE is 16; start the processes with torchrun"),
        (without("MASTER_PORT"), "MASTER_PORT: is not set, though WORLD_SIZE is 16; start"),
        (without("RANK"), "RANK: is not set, though WORLD_SIZE is 16; start"),
        (without("WORLD_SIZE"), "WORLD_SIZE: is not set, though RANK is 9; start"),
        (without(RANK="16"), "RANK: must be a whole number from 0 to 15, got '16'; start"),
        (without(WORLD_SIZE="two"), "WORLD_SIZE: must be a whole number from 1 to"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS is 2, but RANK and WORLD_SIZE are not set; start"),
    ],
)
def test_half_a_launch_is_refused(environment: dict[str, str], start: str) -> None:
    with pytest.raises(UserError) as caught:
        launcher_environment(environment)
    assert str(caught.value).startswith(start)
    assert caught.value.local


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        yield server.getsockname()[1]


def test_port_in_use_is_refused(taken: int) -> None:
    with pytest.raises(UserError, match=f"^MASTER_PORT: port {taken} is in use on this machine; choose another$"):
        rendezvous(RankInfo(0, 2, 0, 2, "127.0.0.1", taken), timeout=2)


def test_rank_that_does_not_come_is_named(free_port: int) -> None:
    expected = f"^rank 1, 2 of 3 did not come to 127.0.0.1:{free_port} within 1 s \\(timeout_s\\)$"
    with pytest.raises(UserError, match=expected) as caught:
        rendezvous(RankInfo(0, 3, 0, 3, "127.0.0.1", free_port), timeout=1)
    assert caught.value.local


def test_rank_0_that_does_not_come_is_refused(free_port: int) -> None:
    with pytest.raises(UserError, match=f"^MASTER_ADDR: 127.0.0.1:{free_port} cannot be reached"):
        rendezvous(RankInfo(1, 2, 1, 2, "127.0.0.1", free_port), timeout=1)


@pytest.mark.parametrize("local_rank", [0, 1])
def test_more_ranks_than_gpus_are_refused_by_all_of_them(monkeypatch: pytest.MonkeyPatch, local_rank: int) -> None:
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device.torch.cuda, "device_count", lambda: 1)
    info = RankInfo(8 + local_rank, 16, local_rank, 2, "node-a", 29500)
    with pytest.raises(UserError, match=r"^device: .*has no GPU, torch sees 1; start fewer processes") as caught:
        world._pick_device("auto", info)
    assert caught.value.local == (local_rank == 0)  # one line a machine


def test_other_commands_refuse_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in TORCHRUN.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("RANK", "0")
    assert main(["predict", "--checkpoint", "a", "--input", "b"]) == 2
    assert capsys.readouterr().err == "pspg-engine predict: error: runs as one process; start it without a launcher\n"

"""The environment that launchers set, and ranks that do not find each other: one line each."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import pytest

from pspg.engine.cli import main
from pspg.engine.distributed import world
from pspg.engine.distributed.launcher import RankInfo, launcher_environment, rendezvous, run_marks
from pspg.engine.training.config import TrainConfig
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


@pytest.fixture
def mute() -> Iterator[Callable[[bytes], int]]:
    """Start a listener that takes connections, says what it is given and nothing else; returns its port."""
    with ExitStack() as stack:

        def listen(words: bytes) -> int:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def answer() -> None:
                with suppress(OSError):
                    while True:
                        client = stack.enter_context(server.accept()[0])
                        client.sendall(words)

            threading.Thread(target=answer, daemon=True).start()
            return server.getsockname()[1]

        yield listen


@pytest.mark.parametrize("words", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_listener_that_is_no_store_is_told_in_time(mute: Callable[[bytes], int], words: bytes) -> None:
    port, since = mute(words), time.monotonic()
    with pytest.raises(UserError, match=f"^MASTER_ADDR: 127.0.0.1:{port} ") as caught:
        rendezvous(RankInfo(1, 2, 1, 2, "127.0.0.1", port), timeout=1)
    assert caught.value.local
    assert time.monotonic() - since < 4


A, B = ["cpu", "train runs/a", "1"], ["cpu", "train runs/b", "1"]


def test_ranks_of_another_run_are_refused_and_disturb_nobody(free_port: int) -> None:
    def rank(number: int, size: int = 2, run: Sequence[str] = A) -> Any:
        return rendezvous(RankInfo(number, size, number, size, "127.0.0.1", free_port), timeout=20, run=run)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(rank, 0)
        where = f"^MASTER_PORT: 127.0.0.1:{free_port} serves another run: "
        with pytest.raises(UserError, match=f"{where}2 ranks, cpu, train runs/a; this is 2 ranks, cpu, train runs/b;"):
            rank(1, run=B)
        with pytest.raises(UserError, match=f"{where}2 ranks, cpu, train runs/a; this is 3 ranks, cpu, train runs/a;"):
            rank(1, size=3)
        with pytest.raises(UserError, match=f"{where}2 ranks, cpu, train runs/a with other settings; start all"):
            rank(1, run=[*A[:2], "2"])
        assert not first.done()
        second = rank(1)
        assert first.result().check(["beat/0", "beat/1"])
        with pytest.raises(UserError, match=f"^RANK: there are two ranks 1 at 127.0.0.1:{free_port}, the other on "):
            rank(1)
        del second


def test_marks_of_a_run_leave_out_what_a_machine_may_have_its_own() -> None:
    config = TrainConfig(output="runs/a")
    same = replace(config, device="cpu", data=replace(config.data, workers=7))
    assert run_marks("train", config) == run_marks("train", same)
    assert run_marks("train", config) != run_marks("train", replace(config, seed=1))


@pytest.mark.parametrize("local_rank", [0, 1])
def test_more_ranks_than_gpus_are_refused_by_all_of_them(monkeypatch: pytest.MonkeyPatch, local_rank: int) -> None:
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device.torch.cuda, "device_count", lambda: 1)
    info = RankInfo(8 + local_rank, 16, local_rank, 2, "node-a", 29500)
    with pytest.raises(UserError, match=r"^device: .*has no GPU, torch sees 1; start fewer processes") as caught:
        world.device_of("auto", info)
    assert caught.value.local == (local_rank == 0)  # one line a machine


def test_other_commands_refuse_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in TORCHRUN.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("RANK", "0")
    assert main(["predict", "--checkpoint", "a", "--input", "b"]) == 2
    assert capsys.readouterr().err == "pspg-engine predict: error: runs as one process; start it without a launcher\n"

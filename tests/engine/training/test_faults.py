"""Ranks that die or stand still: the others end in time, name them, and the run goes on from its checkpoint."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest

from pspg.engine.checkpoints.run import last_checkpoint, read_json
from pspg.engine.training.telemetry import read_metrics

Ranks = list[Popen[str]]


def wait_for_rows(run: Path, rows: int, processes: Ranks) -> None:
    deadline = time.monotonic() + 400
    while len(read_metrics(run / "metrics.jsonl")) < rows:
        assert all(process.poll() is None for process in processes), [p.communicate()[0] for p in processes]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def long_run(settings: Callable[[str], list[str]], run: Path, timeout: int) -> list[str]:
    more = {"output": run, "optim.epochs": 1000, "save_every": 2, "timeout_s": timeout}
    return [
        "-m",
        "pspg.engine",
        *settings("prompt"),
        *(word for key, value in more.items() for word in (f"--{key}", str(value))),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "lost", "words"),
    [
        (signal.SIGKILL, 1, "rank 1 ({host}) is lost: no sign of life for"),
        (signal.SIGSTOP, 0, "rank 0 or its launcher is lost: no answer for"),
    ],
)
def test_lost_rank_is_named(
    tmp_path: Path, settings, ranks: Callable[..., Ranks], number: signal.Signals, lost: int, words: str
) -> None:
    run = tmp_path / "run"
    processes = ranks(long_run(settings, run, timeout=6), 2)
    wait_for_rows(run, 3, processes)
    os.kill(processes[lost].pid, number)
    survivor = processes[1 - lost]
    output, _ = survivor.communicate(timeout=200)
    assert survivor.returncode == 1, output[-3000:]
    lines = [line for line in output.splitlines() if "error" in line]
    kept = f"last good checkpoint: {last_checkpoint(run)}, go on with --resume latest"
    assert len(lines) == 1, output[-3000:]
    assert lines[0].startswith(f"pspg-engine train: error: {words.format(host=socket.gethostname())}")
    assert lines[0].endswith(kept)
    # By the survivor's own clock: how long its process takes to end depends on what else the machine does.
    assert int(re.search(r" for (\d+) s; ", lines[0])[1]) <= 2 * 6
    assert "Traceback" not in output
    assert read_json(last_checkpoint(run) / "state.json")["step"] >= 2


@pytest.mark.slow
def test_rank_killed_under_torchrun_is_named(tmp_path: Path, settings, engine_command) -> None:
    """torchrun ends the other ranks with SIGTERM a moment after one has died."""
    run = tmp_path / "run"
    launcher = engine_command(long_run(settings, run, timeout=60)[2:], processes=3)
    children: list[int] = []
    try:
        wait_for_rows(run, 3, [launcher])
        children = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
        victim = next(
            pid
            for pid in children
            if b"RANK=2\0" in Path(f"/proc/{pid}/environ").read_bytes().replace(b"LOCAL_RANK", b"")
        )
        os.kill(victim, signal.SIGKILL)
        output, _ = launcher.communicate(timeout=200)
    finally:
        for pid in children:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        launcher.kill()
    lines = [line for line in output.splitlines() if line.startswith("pspg-engine")]
    assert launcher.returncode != 0
    assert len(lines) == 1, output[-3000:]
    assert lines[0].startswith(
        f"pspg-engine train: error: rank 2 ({socket.gethostname()}) is lost: no sign of life for"
    )
    assert lines[0].endswith(f"last good checkpoint: {last_checkpoint(run)}, go on with --resume latest")


WORK = """
import os, signal, sys, time
from pspg.engine.distributed.launcher import launcher_environment, rendezvous
from pspg.engine.distributed.watch import Watch, advance
info = launcher_environment()
store = rendezvous(info, 60)
report = lambda line: print(line, flush=True)
with Watch(store, info.rank, info.world_size, speaks_alone=False, timeout={timeout}, report=report):
    {work}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "timeout", "line"),
    [
        (
            "[advance() for _ in range(3 - info.rank)]; time.sleep(60)",
            5,
            "rank 1 ({host}) is stuck: no progress for over 5 s while the others wait",
        ),
        ("advance() if info.rank else sys.exit('its own error'); time.sleep(60)", 60, "its own error"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", 60, "stopped by SIGTERM"),
    ],
    ids=["stuck", "own error", "SIGTERM"],
)
def test_ranks_leave_together(ranks: Callable[..., Ranks], work: str, timeout: int, line: str) -> None:
    processes = ranks(["-c", WORK.format(work=work, timeout=timeout)], 2)
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert all(process.returncode == 1 for process in processes), outputs
    said = [line for output in outputs for line in output.splitlines()]
    assert said == [line.format(host=socket.gethostname())]

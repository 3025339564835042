"""Run `pspg-engine ARGUMENTS` in rounds, on other numbers of ranks; in each but the last, one kills itself.

The file named on the command line holds ARGUMENTS and the rounds: [number of ranks, victim, event]. An event is a
collective or the writing of a tensor file; the victim ends with SIGKILL before its event of that number. Ranks are
forks of this process, as importing takes longer than a round. Prints the exit status of every rank, a line a round.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: F401
import torch.distributed as dist

import pspg.engine.checkpoints.run as run_files
from pspg.engine.cli import main
from pspg.engine.commands import train  # noqa: F401

EVENTS = ("all_gather", "all_gather_object", "all_reduce", "barrier", "broadcast", "reduce_scatter")
PATIENCE = 120
"""seconds for a round"""


def die_before(event: int) -> None:
    """Have this process kill itself in place of its event of that number, from 1."""
    seen = 0

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **settings: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **settings)

        return call

    for name in EVENTS:
        setattr(dist, name, counted(getattr(dist, name)))
    run_files.write_tensors = counted(run_files.write_tensors)


def work(rank: int, count: int, port: int, arguments: list[str], event: int | None) -> int:
    if count > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    if event is not None:
        die_before(event)
    return main(arguments)


def in_fork(*arguments: Any) -> int:
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        status = work(*arguments)
    finally:
        sys.stdout.flush()
        os._exit(status)


def statuses(processes: list[int]) -> list[int]:
    """Exit status of every process, −9 for a killed one; one that outlasts the patience is killed and counts as −1."""
    found: dict[int, int] = {}
    end = time.monotonic() + PATIENCE
    while len(found) < len(processes) and time.monotonic() < end:
        for process in set(processes) - found.keys():
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                found[process] = os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    for process in set(processes) - found.keys():
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return [found.get(process, -1) for process in processes]


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    for count, victim, event in task["rounds"]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [
            in_fork(rank, count, port, task["arguments"], event if rank == victim else None) for rank in range(count)
        ]
        print(json.dumps(statuses(ranks)), flush=True)

"""Other processes: a child that answers messages, and one that runs jobs and may die of them."""

from __future__ import annotations

import gc
import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .jobs import Job
from .rows import FAILED, TOO_LARGE, Row


class Child:
    """A fresh process with a pipe to it.

    Args:
        work: called there with its end of the pipe and the arguments.
    """

    def __init__(self, work: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # No daemon: those may not start loader processes.
        self._process = context.Process(target=work, args=(theirs, *arguments))
        self._process.start()
        theirs.close()

    def ask(self, message: object) -> Any:
        """Send a message and wait for the answer.

        Raises:
            EOFError: the process has ended.
        """
        try:
            self.pipe.send(message)
        except BrokenPipeError:
            raise EOFError from None
        return self.pipe.recv()

    def close(self, patience: float = 0.5) -> str:
        """End the process; how it ended, in a few words."""
        self.pipe.close()
        self._process.join(patience)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return f"its process ended with status {self._process.exitcode}"


class Runner:
    """Runs jobs in another process, so that one that is killed for its memory takes nothing with it.

    On a CPU each job has a process of its own. On a GPU one serves all jobs until one fails or it dies: starting CUDA
    takes longer than most of them.
    """

    def __init__(self, device: torch.device, peaks: Mapping[str, float]) -> None:
        self._device, self._peaks = device, peaks
        self._child: Child | None = None

    def run(self, job: Job, deadline: float | None = None) -> list[Row] | None:
        """Rows of a job; None: the deadline (of `time.monotonic`) came first, and the job counts as not run."""
        without: dict[str, tuple[str, str]] = {}
        while True:
            child = self._child = self._child or Child(_work, self._device, self._peaks)
            child.pipe.send((job, without))
            running, answer = "", None
            while answer is None:
                if not child.pipe.poll(None if deadline is None else max(deadline - time.monotonic(), 0)):
                    self.close()
                    return None
                try:
                    message = child.pipe.recv()
                except EOFError:
                    break
                if isinstance(message, str):
                    running = message
                else:
                    answer = message
            # A kernel that has broken the CUDA context would fail every later job of its process, too.
            ended = ""
            if self._device.type == "cpu" or answer is None or any(row.status == FAILED for row in answer):
                ended = self.close()
            if answer is not None:
                rows: list[Row] = answer
                return rows
            if not running or running in without:
                return [broken(job, self._device, ended)]
            without[running] = TOO_LARGE, ended

    def close(self) -> str:
        """End the process; how it ended, in a few words."""
        child, self._child = self._child, None
        return child.close() if child else ""


def _work(pipe: Any, device: torch.device, peaks: Mapping[str, float]) -> None:
    """Answers (job, without) with labels as they start, then with the rows."""
    while True:
        try:
            job, without = pipe.recv()
        except EOFError:
            return
        gc.collect()
        gc.freeze()  # what is imported stays: looking through it costs 0.2 s before every repetition
        try:
            rows = list(job.run(device, peaks, without, pipe.send))
        except (KeyboardInterrupt, BrokenPipeError):  # nobody waits for the rows any more
            return
        except Exception as error:  # a broken job is a row, and must not end the others
            traceback.print_exc()
            rows = [broken(job, device, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")]
        pipe.send(rows)


def broken(job: Job, device: torch.device, reason: str) -> Row:
    """The row of a job of which nothing else is known."""
    row = Row(job=job.key, operator=job.op, impl="-", sizes={}, device=device.type, dtype=job.dtype)
    return row.without_numbers(FAILED, reason[:200])

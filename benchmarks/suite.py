"""`python -m benchmarks.suite`: every measurement, the most important first, into one folder; run again, it continues.

A job runs in a process of its own, so that one that is killed for its memory takes nothing with it. On a GPU one
process serves all jobs until one fails or it dies: starting CUDA takes longer than most of them.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from pspg.engine.utils.errors import UserError

from .machine import commit, describe_machine, peak_bandwidth, peak_flops, versions
from .rows import FAILED, OK, Results, Row

Started = Callable[[str], None]
"""told the name of the provider that runs next"""


class Job(Protocol):
    """Something to measure; pickled to the process that runs it."""

    @property
    def key(self) -> str:
        """Unique name, such as operators/prompt_decoder/C14-B16-fp32."""

    @property
    def rank(self) -> int:
        """Jobs of a lower rank run first."""

    def run(self, device: torch.device, without: Mapping[str, str], started: Started) -> list[Row]:
        """Rows of every provider; those of `without` (provider → why) are not run but listed as `does not fit`."""


def all_jobs(device: str) -> list[Job]:
    """What is measured on a device, the most important first.

    Operators need torch, triton and numpy; the others what the engine needs, and are left out where that is missing.
    """
    jobs: list[Job] = []
    for name in ("operators", "steps", "growth", "pipeline"):
        try:
            module = importlib.import_module(f".{name}", __package__)
        except ModuleNotFoundError as error:
            if name == "operators":
                raise
            _say(f"{name}: left out, {error.name} is not installed")
        else:
            jobs += module.jobs(device)
    return sorted(jobs, key=lambda job: job.rank)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the jobs; returns the exit status: 1 if a row FAILED, 2 after a user's mistake, 130 after Ctrl-C."""
    options = _parse(arguments)
    try:
        return _run(options)
    except UserError as error:
        print(f"benchmarks.suite: error: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="folder of results (build/bench)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--budget_s", type=float, help="seconds after which no more jobs run; run again to continue")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only jobs whose key contains one of these")
    parser.add_argument("--list", action="store_true", help="list the jobs and end")
    parser.add_argument("--commit", default=None, help="of the code, where it is no git checkout")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> int:
    begin = time.monotonic()
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU")
    jobs = [job for job in all_jobs(name) if not options.only or any(text in job.key for text in options.only)]
    if not jobs:
        raise UserError(f"--only {' '.join(options.only)}: no job has such a key; see --list")
    if options.list:
        print("\n".join(job.key for job in jobs))
        return 0
    device = torch.device(name)
    facts = {"machine": describe_machine(device), "versions": versions(), "commit": options.commit or commit()}
    results = Results(options.output, {"device": name, **facts})
    if "peaks" not in results.environment:
        results.note(peaks=measure_peaks(device))
    waiting = [job for job in jobs if job.key not in results.done()]
    deadline = None if options.budget_s is None else begin + options.budget_s
    runner = Runner(device)
    interrupted = False
    try:
        for number, job in enumerate(waiting):
            if deadline is not None and time.monotonic() >= deadline:
                break
            _say(f"[{number + 1}/{len(waiting)}, {time.monotonic() - begin:.0f} s] {job.key}")
            rows = runner.run(job, deadline)
            if rows is None:
                break
            results.add(with_roofline(row, results.environment["peaks"]) for row in rows)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        runner.close()
    measured = [row for row in results.rows if row.job in {job.key for job in jobs}]
    print_table(measured)
    left = len([job for job in jobs if job.key not in results.done()])
    if left:
        _say(f"{left} of {len(jobs)} jobs are left; run the same command again to continue in {options.output}")
    failed = [row for row in measured if row.status == FAILED]
    for row in failed:
        print(f"benchmarks.suite: FAILED: {row.job} {row.provider}: {row.detail}", file=sys.stderr)
    return 130 if interrupted else 1 if failed else 0


def measure_peaks(device: torch.device) -> dict[str, float]:
    """FLOP/s of large matrix products by dtype, and bytes/s of large copies, of this device now."""
    dtypes = {"fp32": torch.float32}
    if device.type == "cuda":
        dtypes["bf16"] = torch.bfloat16
    rates = {name: peak_flops(device, dtype) for name, dtype in dtypes.items()}
    return {**rates, "bandwidth": peak_bandwidth(device)}


def with_roofline(row: Row, peaks: Mapping[str, float]) -> Row:
    """The row with its share of what the device could reach."""
    if row.status != OK or not row.p50 or row.flops is None or row.bytes is None:
        return row
    floor = max(row.flops / peaks[row.dtype], row.bytes / peaks["bandwidth"])
    return replace(row, roofline=floor / row.p50)


class Runner:
    """Runs jobs in another process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process: Any = None
        self._pipe: Connection | None = None

    def run(self, job: Job, deadline: float | None) -> list[Row] | None:
        """Rows of a job; None: the deadline came first, and the job counts as not run."""
        without: dict[str, str] = {}
        while True:
            pipe = self._start()
            pipe.send((job, without))
            running, answer = "", None
            while answer is None:
                wait = None if deadline is None else max(deadline - time.monotonic(), 0)
                if not pipe.poll(wait):
                    self.close()
                    return None
                try:
                    message = pipe.recv()
                except EOFError:
                    break
                if isinstance(message, str):
                    running = message
                else:
                    answer = message
            # A kernel that has broken the CUDA context would fail every later job of its process, too.
            broken = answer is None or any(row.status == FAILED for row in answer)
            if self._device.type == "cpu" or broken:
                status = self.close()
            if answer is not None:
                rows: list[Row] = answer
                return rows
            if not running or running in without:
                return [_broken(job, f"its process ended with status {status}")]
            without[running] = f"its process ended with status {status}"

    def close(self) -> int | None:
        """End the process; its exit status."""
        if self._process is None:
            return None
        if self._pipe is not None:
            self._pipe.close()
        self._process.join(0.5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        status: int | None = self._process.exitcode
        self._process = self._pipe = None
        return status

    def _start(self) -> Connection:
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            # No daemon: those may not start loader processes.
            self._process = context.Process(target=_work, args=(theirs, self._device))
            self._process.start()
            theirs.close()
        return self._pipe


def _work(pipe: Connection, device: torch.device) -> None:
    """Answers (job, without) with provider names as they start, then with the rows."""
    while True:
        try:
            job, without = pipe.recv()
        except EOFError:
            return
        gc.collect()
        gc.freeze()  # what is imported stays: looking through it costs 0.2 s before every repetition
        try:
            rows = job.run(device, without, pipe.send)
        except (KeyboardInterrupt, BrokenPipeError):  # nobody waits for the rows any more
            return
        except Exception as error:  # a broken job is a row, and must not end the others
            traceback.print_exc()
            rows = [_broken(job, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")]
        pipe.send(rows)


def _broken(job: Job, reason: str) -> Row:
    suite, operator, *_ = job.key.split("/")
    return Row(job=job.key, suite=suite, operator=operator, provider="-", status=FAILED, detail=reason[:200])


def print_table(rows: Sequence[Row]) -> None:
    """Times, of operators forward and backward together, a provider a column."""
    providers = ["reference", "repaired", "eager", "compiled", "triton"]
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.direction == "both" or row.suite != "operators":
            cases.setdefault(row.job, {})[row.provider] = row
    others = sorted({row.provider for row in rows} - set(providers) - {"-"})
    width = max([len(key) for key in cases], default=4)
    print(f"{'':<{width}}" + "".join(f"{name:>14}" for name in [*providers, *others]))
    for key, found in cases.items():
        cells = [_cell(found.get(name)) for name in [*providers, *others]]
        print(f"{key:<{width}}" + "".join(f"{cell:>14}" for cell in cells))
    counts = Counter(row.status for row in rows)
    print(", ".join(f"{count} rows {status}" for status, count in counts.items()))


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return row.status if row.p50 is None else f"{1000 * row.p50:.4g} ms"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

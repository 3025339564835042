"""`python -m benchmarks.run`: times and memory of any operator, step or loader at any shape, behind a correctness gate.

With --op: those implementations at that shape. Without: the standard jobs of this device, the most important first,
into the results file of a folder; run again, it continues.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pspg.engine.errors import UserError
from pspg.engine.files import check_output

from .growth import fits
from .jobs import Job, device_of, make_job, peaks_of, standard_jobs
from .machine import DTYPES, environment
from .registry import DIRECTIONS, registry
from .rows import FAILED, Results, Row, write_results
from .tables import HEAD, aligned, lines_of, reasons
from .worker import Runner


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status: 1 if a row FAILED, 2 after a user's mistake, 130 after Ctrl-C."""
    try:
        options = _parse(arguments)
        device = torch.device(device_of(options.device))
        if options.op is None:
            return _run_standard(options, device)
        return _list(options.op) if options.list else _run_one(options, device)
    except UserError as error:
        print(f"benchmarks.run: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    one = parser.add_argument_group("one operator, step or loader")
    one.add_argument("--op", help="its name; --list shows them all")
    one.add_argument("--shape", default="", metavar="C=193,B=64", help="sizes; C=14,28,108 measures each and fits growth")
    one.add_argument("--dtype", help="fp32, bf16 or fp16 (bf16 on a GPU, else fp32)")
    one.add_argument("--impl", nargs="+", default=[], help="implementations (all but compiled)")
    one.add_argument("--direction", nargs="+", default=[], help="forward, backward, both (all)")
    one.add_argument("--json", type=Path, metavar="OUT", help="write the rows")
    many = parser.add_argument_group("standard jobs")
    many.add_argument("--output", type=Path, help="folder of results.json (build/bench)")
    many.add_argument("--only", nargs="+", metavar="TEXT", help="only jobs whose key contains one of these")
    many.add_argument("--budget_s", type=float, help="seconds after which no more jobs run; run again to continue")
    parser.add_argument("--list", action="store_true", help="list operators, or the standard jobs if --only is given")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--commit", help="of the code, where it is no git checkout")
    parser.error = _raise  # type: ignore[method-assign, assignment]
    options = parser.parse_args(arguments)
    first, second = ("shape", "dtype", "impl", "direction", "json"), ("output", "only", "budget_s")
    for name in second if options.op else () if options.list else first:
        if getattr(options, name):
            raise UserError(f"--{name}: " + ("is for the standard jobs, without --op" if options.op else "give --op, too"))
    return options


def _raise(message: str) -> None:
    raise UserError(message)


def parse_shape(text: str) -> dict[str, tuple[int, ...]]:
    """Letter → sizes of `C=14,28,B=16`.

    Raises:
        UserError: text of another form.
    """
    found: dict[str, tuple[int, ...]] = {}
    letter = ""
    for word in filter(None, text.split(",")):
        name, equals, size = word.rpartition("=")
        letter = name.strip() if equals else letter
        if not letter or not size.strip().isdecimal() or (equals and letter in found):
            raise UserError(f"--shape {text}: {word!r} is not of the form LETTER=SIZE, such as C=193,B=64")
        found[letter] = (*found.get(letter, ()), int(size))
    return found


def _list(only: str | None) -> int:
    """Print names, letters with defaults, implementations, directions and dtypes."""
    entries, missing = registry()
    for name, entry in entries.items():
        if only in (None, name):
            sizes = ",".join(f"{letter}={size}" for letter, size in entry.letters.items())
            print(f"{name:<17} {sizes}\n{'':<17} {' '.join(entry.impls)}; {' '.join(entry.directions)}; {' '.join(entry.dtypes)}")
    for module, package in missing.items():
        print(f"{module}: left out, {package} is not installed", file=sys.stderr)
    return 0


def _run_one(options: argparse.Namespace, device: torch.device) -> int:
    shape = parse_shape(options.shape)
    job = make_job(
        options.op, shape, device.type, dtype=options.dtype, impls=options.impl, directions=options.direction
    )
    if options.json:
        check_output(options.json, folder=False, key="--json")
    _say(f"{job.key}: {' '.join(job.impls)} on {device.type}")
    runner, peaks = Runner(device, peaks_of(device, (job.dtype,))), peaks_of(device, (job.dtype,))
    try:
        rows = runner.run(job) or []
    finally:
        runner.close()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {**environment(device, options.commit), "peaks": peaks}
        write_results(options.json, {"environment": facts, "rows": rows})
    return _show(rows)


def _run_standard(options: argparse.Namespace, device: torch.device) -> int:
    begin = time.monotonic()
    if options.list and not options.only:
        return _list(None)
    only = options.only or [""]
    jobs = [job for job in standard_jobs(device.type) if any(text in job.key for text in only)]
    if not jobs:
        raise UserError(f"--only {' '.join(only)}: no standard job has such a key; --list --only / shows them all")
    if options.list:
        print("\n".join(job.key for job in jobs))
        return 0
    folder = options.output or Path("build/bench")
    check_output(folder, key="--output")
    results = Results(folder / "results.json", environment(device, options.commit))
    if "peaks" not in results.environment:
        results.environment["peaks"] = peaks_of(device, tuple(DTYPES)[: 1 if device.type == "cpu" else 2])
    for module, package in registry()[1].items():
        _say(f"{module}: left out, {package} is not installed")
    left = [job for job in jobs if job.key not in {row.job for row in results.rows}]
    runner = Runner(device, results.environment["peaks"])
    try:
        interrupted = _work_off(left, results, runner, begin, options.budget_s)
    finally:
        runner.close()
    keys = {job.key for job in jobs}
    status = _show([row for row in results.rows if row.job in keys])
    if left:
        _say(f"{len(left)} of {len(jobs)} jobs are left; run the same command again to continue in {folder}")
    return 130 if interrupted else status


def _work_off(left: list[Job], results: Results, runner: Runner, begin: float, budget: float | None) -> bool:
    """Take jobs from the list as they are done; returns whether Ctrl-C came in between."""
    deadline, count = None if budget is None else begin + budget, len(left)
    try:
        while left and (deadline is None or time.monotonic() < deadline):
            _say(f"[{count - len(left) + 1}/{count}, {time.monotonic() - begin:.0f} s] {left[0].key}")
            rows = runner.run(left[0], deadline)
            if rows is None:
                return False
            results.add(rows)
            left.pop(0)
    except KeyboardInterrupt:
        return True
    return False


def _show(rows: Sequence[Row]) -> int:
    """Print the table, what else there is to say, and the growth; returns the exit status."""
    print(aligned(HEAD, lines_of(rows)))
    for line in [*reasons(rows), *(fit.text for fit in fits(rows))]:
        print(line)
    return 1 if any(row.status == FAILED for row in rows) else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

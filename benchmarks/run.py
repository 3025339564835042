"""`python -m benchmarks.run`: times and memory of any operator, step or loader at any shape, behind a correctness gate.

With --op: that one, at the shape that is given. Without: the standard jobs of this device, the most important first,
into results.json of a folder; run again, it continues.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from pspg.engine.utils.errors import UserError
from pspg.engine.utils.files import check_output

from .command import command
from .jobs import Job, device_of, make_job, peaks_of, registry, standard_jobs
from .machine import environment
from .rows import FAILED, read_results, write_results
from .tables import aligned, fits, lines_of, reasons

SAME = ("commit", "machine", "versions", "device")
"""what of the environment must not change within a file"""


@command("benchmarks.run")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status: 1 if a row FAILED."""
    options = _parse(arguments)
    return _run(options, torch.device(device_of(options.device)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    one, many = (parser.add_argument_group(name) for name in ("one operator, step or loader", "the standard jobs"))
    one.add_argument("--op", help="its name")
    one.add_argument("--shape", metavar="C=193,B=64", help="sizes; C=14,28,108 measures each, and fits how time grows")
    one.add_argument("--dtype", help="fp32, bf16 or fp16 (bf16 on a GPU, else fp32)")
    one.add_argument("--impl", nargs="+", help="implementations (all but compiled)")
    one.add_argument("--direction", nargs="+", help="forward, backward, both (all)")
    one.add_argument("--json", type=Path, metavar="OUT", help="write the rows")
    many.add_argument("--output", type=Path, help="folder of results.json (build/bench)")
    many.add_argument("--only", nargs="+", metavar="TEXT", help="only jobs whose key contains one of these")
    many.add_argument("--budget_s", type=float, help="seconds after which no more jobs start; run again to continue")
    parser.add_argument("--list", action="store_true", help="list what can be measured, and the keys of standard jobs")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--commit", help="of the code, where it is no git checkout")
    parser.error = _error  # type: ignore[method-assign]
    options = parser.parse_args(arguments)
    for group, misplaced, advice in (
        (one, options.op is None, "give --op, too"),
        (many, options.op is not None, "is for the standard jobs; leave out --op"),
    ):
        for action in group._group_actions if misplaced else ():
            if getattr(options, action.dest) is not None:
                raise UserError(f"{action.option_strings[0]}: {advice}")
    return options


def _error(message: str) -> NoReturn:
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


def _run(options: argparse.Namespace, device: torch.device) -> int:
    for module, package in registry()[1].items():
        _say(f"{module}: left out, {package} is not installed")
    if options.op is None:
        only = options.only or [""]
        jobs = [job for job in standard_jobs(device.type) if any(text in job.key for text in only)]
        if not jobs:
            raise UserError(f"--only {' '.join(only)}: no standard job has such a key; --list shows them")
    else:
        arguments = {"dtype": options.dtype, "impls": options.impl or (), "directions": options.direction or ()}
        jobs = [make_job(options.op, parse_shape(options.shape or ""), device.type, **arguments)]
    if options.list:
        return _list(options.op, jobs if options.op is None else [])
    path = options.json if options.op else (options.output or Path("build/bench")) / "results.json"
    if path:
        check_output(path, folder=False, key="--json" if options.op else "--output")
    facts = environment(device, options.commit)
    facts["peaks"] = peaks_of(device, tuple(sorted({job.dtype for job in jobs})))
    content: dict[str, Any] = {"environment": facts, "rows": []}
    if options.op is None and path.exists():
        content = _continued(path, content)
    return _measure(jobs, content, path, device, options.budget_s)


def _continued(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Rows that a file holds already; peaks of other dtypes are added.

    Raises:
        UserError: it is no results file, or of another environment.
    """
    earlier, now = read_results(path), content["environment"]
    for key in SAME:
        if earlier["environment"].get(key) != now[key]:
            raise UserError(f"{path}: holds results of another {key}; choose a new folder")
    peaks = {**now["peaks"], **earlier["environment"]["peaks"]}
    return {**earlier, "environment": {**now, "peaks": peaks}}


def _measure(jobs: list[Job], content: dict[str, Any], path: Path | None, device: torch.device, budget: Any) -> int:
    """Run the jobs that are not done, keep their rows at once, and print all rows of the jobs."""
    begin, interrupted = time.monotonic(), False
    left = [job for job in jobs if job.key not in {row.job for row in content["rows"]}]
    count = len(left)
    try:
        while left and (budget is None or time.monotonic() - begin < budget):
            job = left[0]
            _say(f"[{count - len(left) + 1}/{count}, {time.monotonic() - begin:.0f} s] {job.key} {' '.join(job.impls)}")
            content["rows"] += job.run(device, content["environment"]["peaks"])
            if path:
                write_results(path, content)
            left.pop(0)
            # A broken kernel can leave the GPU's context unusable, and would fail every later job, too.
            if device.type == "cuda" and any(row.job == job.key and row.status == FAILED for row in content["rows"]):
                break
    except KeyboardInterrupt:
        interrupted = True
    rows = [row for row in content["rows"] if row.job in {job.key for job in jobs}]
    print("\n".join([aligned(lines_of(rows)), *reasons(rows), *map(str, fits(rows))]))
    if left:
        _say(f"{len(left)} of {len(jobs)} jobs are left; run the same command again to continue")
    return 130 if interrupted else 1 if any(row.status == FAILED for row in rows) else 0


def _list(only: str | None, jobs: Sequence[Job]) -> int:
    """Print names, letters with defaults, implementations, directions and dtypes."""
    for name, entry in registry()[0].items():
        if only in (None, name):
            sizes = ",".join(f"{letter}={size}" for letter, size in entry.letters.items())
            names = "; ".join(" ".join(part) for part in (entry.impls, entry.directions, entry.dtypes))
            print(f"{name:<17} {sizes}\n{'':<17} {names}")
    print("\n".join(job.key for job in jobs))
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.compare A B`: is B slower than A? A and B are two commits, or two folders of results.

Of two commits each is checked out into a temporary working tree, and the same jobs run in turns, A, B, A, B, …, every
time in a fresh process. A row is slower or faster only where the interval of the ratio B/A leaves out 1 and the ratio
exceeds what A shows against the next A. Of two folders it is where the ranges p20 to p80 do not overlap: they were
measured at different times, and what the machine did meanwhile counts as a difference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from pspg.engine.utils.errors import UserError

from .checkout import Checkout, checked_out, commit_of
from .paired import SLOWER, Comparison, coverage, paired, unpaired
from .present import measured, number, origin, seconds, times
from .rows import Row, read_environment, read_rows

ROOT = Path(__file__).parents[1]


class Key(NamedTuple):
    """What is compared with what."""

    job: str
    operator: str
    provider: str
    direction: str
    C: int | None
    B: int | None
    n: int | None
    dtype: str


Rows = Mapping[Key, Row]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; returns the exit status: 1 if B is slower or lost a row, 2 after a mistake, 130 after Ctrl-C."""
    options = _parse(arguments)
    try:
        return _compare(options)
    except UserError as error:
        print(f"benchmarks.compare: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("a", metavar="A", help="commit, or folder of results")
    parser.add_argument("b", metavar="B", help="commit, or folder of results")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="only jobs whose key contains one of these"
    )
    parser.add_argument("--pairs", type=int, default=6, help="turns of A and B (6, the fewest that give 95 %%)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--fail_above", type=float, default=1.05, help="ratio above which a slower row fails (1.05)")
    options = parser.parse_args(arguments)
    if options.pairs < 3:
        parser.error(f"--pairs {options.pairs}: give at least 3")
    return options


def _compare(options: argparse.Namespace) -> int:
    folders = [Path(name).is_dir() for name in (options.a, options.b)]
    if any(folders) and not all(folders):
        raise UserError(f"{options.a} {options.b}: one is a folder and one is not; give two commits or two folders")
    if all(folders):
        a, b, compared = compare_folders(Path(options.a), Path(options.b), options.only)
    else:
        a, b, compared = compare_commits(ROOT, options)
    print_table(compared)
    lost = lost_rows(a, b)
    slower = [key for key, one in compared.items() if one.verdict == SLOWER and one.ratio > options.fail_above]
    print(f"{len(slower)} of {len(compared)} rows are slower by more than {number(100 * (options.fail_above - 1))} %")
    return 1 if slower or lost else 0


def compare_folders(a: Path, b: Path, only: Sequence[str]) -> tuple[Rows, Rows, dict[Key, Comparison]]:
    """Rows of two results folders, unpaired.

    Raises:
        UserError: no results, of another form, of different devices, or without a common row.
    """
    environments = [read_environment(folder) for folder in (a, b)]
    if _device(environments[0]) != _device(environments[1]):
        raise UserError(f"{a} {b}: are of different devices; measure both on one")
    found = [
        _by_key(row for row in read_rows(folder) if not only or any(text in row.job for text in only))
        for folder in (a, b)
    ]
    for name, folder, environment in zip("AB", (a, b), environments, strict=True):
        print(f"{name} {folder}: {origin(environment)}")
    print("measured at different times, not in turns: interval is p20 to p80 over p80 to p20\n")
    both = _measured_in_both(*found)
    return found[0], found[1], {key: unpaired(times(found[0][key]), times(found[1][key])) for key in both}


def compare_commits(repository: Path, options: argparse.Namespace) -> tuple[Rows, Rows, dict[Key, Comparison]]:
    """Rows of two commits, measured in turns.

    Raises:
        UserError: no such commits, no common jobs, or a suite that does not run.
    """
    commits = [(ref, commit_of(repository, ref)) for ref in (options.a, options.b)]
    with ExitStack() as stack:
        a, b = (stack.enter_context(checked_out(repository, *commit)) for commit in commits)
        jobs = _common_jobs(a, b, options)
        turns: dict[Checkout, list[Rows]] = {a: [], b: []}
        bar = tqdm(total=2 * options.pairs, desc="runs", disable=None, leave=False)
        for turn in range(options.pairs):
            for checkout, found in turns.items():
                found.append(_by_key(checkout.measure(options.device, jobs, turn)))
                bar.update()
        bar.close()
    for name, one in (("A", a), ("B", b)):
        print(f"{name} {one.ref}: commit {one.commit[:12]}")
    print(f"{options.pairs} pairs in turns; the median ratio's interval covers {100 * coverage(options.pairs):.0f} %\n")
    first, second = (_merge(found) for found in turns.values())
    compared = {}
    for key in _measured_in_both(first, second):
        series = [[times(rows[key])[1] for rows in found] for found in turns.values()]
        compared[key] = paired(*series)
    return first, second, compared


def print_table(compared: Mapping[Key, Comparison]) -> None:
    """A line a row: both times, their ratio, its interval, the noise, the verdict."""
    lines = [("", "A", "B", "B/A", "interval", "noise", "")]
    for key, one in compared.items():
        noise = "" if one.noise is None else f"±{number(100 * (one.noise - 1))} %"
        ratio, interval = f"{one.ratio:.3f}", f"{one.low:.3f}–{one.high:.3f}"
        lines.append((_name(key), seconds(one.a), seconds(one.b), ratio, interval, noise, one.verdict))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for first, *rest in lines:
        print("  ".join([f"{first:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(rest, widths[1:], strict=True))]))


def lost_rows(a: Rows, b: Rows) -> list[Key]:
    """Rows that A has numbers for and B has not; prints them, and all that could not be compared."""
    for name, ours, theirs in (("A", a, b), ("B", b, a)):
        for key in ours.keys() - theirs.keys():
            print(f"only in {name}: {_name(key)}")
    without = [key for key in a if key in b and not (measured(a[key]) and measured(b[key]))]
    directions: dict[tuple[str, str, str], list[str]] = {}
    for key in without:
        states = ", then ".join(dict.fromkeys([_state(a[key]), _state(b[key])]))
        directions.setdefault((key.job, key.provider, states), []).append(key.direction)
    for (job, provider, states), names in directions.items():
        print(f"not compared: {job} {provider} {', '.join(names)}: {states}")
    return [key for key in without if measured(a[key])]


def _common_jobs(a: Checkout, b: Checkout, options: argparse.Namespace) -> list[str]:
    ours, theirs = (checkout.jobs(options.device, options.only) for checkout in (a, b))
    for checkout, jobs, others in ((a, ours, theirs), (b, theirs, ours)):
        for job in jobs:
            if job not in others:
                print(f"only in {checkout.ref}, not measured: {job}")
    common = [job for job in ours if job in theirs]
    if not common:
        raise UserError(f"{a.ref} {b.ref}: have no job in common; choose other commits or another --only")
    return common


def _by_key(rows: Iterable[Row]) -> Rows:
    return {
        Key(row.job, row.operator, row.provider, row.direction, row.C, row.B, row.n, row.dtype): row for row in rows
    }


def _merge(turns: Sequence[Rows]) -> Rows:
    """A row of each key: one without numbers wherever a turn has none."""
    missing = {key: row for rows in turns for key, row in rows.items() if not measured(row)}
    return {key: missing.get(key, row) for key, row in turns[0].items() if all(key in rows for rows in turns)} | missing


def _measured_in_both(a: Rows, b: Rows) -> list[Key]:
    keys = [key for key, row in a.items() if measured(row) and key in b]
    if not keys:
        raise UserError("A: has no measured row that B has, too; compare others, or without --only")
    return [key for key in keys if measured(b[key])]


def _device(environment: Mapping[str, Any]) -> tuple[Any, ...]:
    machine = environment["machine"]
    return environment["device"], machine.get("gpu") or (machine["processor"], machine["threads"])


def _name(key: Key) -> str:
    return f"{key.job} {key.provider} {key.direction}"


def _state(row: Row) -> str:
    return "measured" if measured(row) else f"{row.status} ({row.detail})" if row.detail else row.status


if __name__ == "__main__":
    sys.exit(main())

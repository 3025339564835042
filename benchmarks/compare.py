"""`python -m benchmarks.compare A B --op spcl …`: is commit B slower than commit A?

Each is checked out into a temporary working tree, and `benchmarks.run` runs in turns, A, B, A, B, …, every time in a
fresh process that imports that commit's code. All arguments but those below go to `benchmarks.run`. A row is slower or
faster only where the interval of the ratio B/A leaves out 1 and the ratio exceeds what A shows against the next A.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import isnan
from pathlib import Path
from statistics import median
from typing import NamedTuple

from scipy.stats import quantile_test
from tqdm import tqdm

from pspg.engine.utils.errors import UserError

from .command import command
from .rows import Row, read_results
from .tables import SECONDS, number, scaled, times

ROOT = Path(__file__).parents[1]
SLOWER, FASTER, SAME = "slower", "faster", "within noise"


@command("benchmarks.compare")
def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a row; returns the exit status: 1 if B is slower or lost a row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("a", metavar="A", help="a commit")
    parser.add_argument("b", metavar="B", help="the commit that may be slower")
    parser.add_argument("--pairs", type=int, default=6, help="turns of A and B (6)")
    parser.add_argument("--fail_above", type=float, default=1.05, help="ratio above which a slower row fails (1.05)")
    options, passed_on = parser.parse_known_args(arguments)
    if options.pairs < 6:
        raise UserError(f"--pairs {options.pairs}: give at least 6, the fewest that have a 95 % interval")
    if kept := {"--json", "--list"} & {word.partition("=")[0] for word in passed_on}:
        raise UserError(f"{kept.pop()}: a comparison is printed only; benchmarks.run has this option")
    return _compare(options, passed_on)


def _compare(options: argparse.Namespace, passed_on: Sequence[str]) -> int:
    a, b = options.a, options.b
    series: dict[str, dict[str, list[Row]]] = {}
    with checked_out(a) as one, checked_out(b) as other:
        turns = [tree for _ in range(options.pairs) for tree in (one, other)]
        for number_, tree in enumerate(tqdm(turns, "runs", disable=None, leave=False)):
            for row in run(tree, passed_on):
                name = f"{row.operator} {row.shape} {row.impl} {row.direction}"
                series.setdefault(name, {"A": [], "B": []})["AB"[number_ % 2]].append(row)
    print(f"A {a}, B {b}: {options.pairs} pairs in turns; median ratio with its 95 % interval")
    bad = 0
    for name, found in series.items():
        rows = found["A"] + found["B"]
        if len(rows) < 2 * options.pairs or not all(row.measured for row in rows):
            print(f"{name}: not compared, {next((times(row) for row in rows if not row.measured), 'not in every run')}")
            bad += bool(found["A"]) and all(row.measured for row in found["A"])
            continue
        result = paired(*([row.p50 or 0.0 for row in found[which]] for which in "AB"))
        print(f"{name}: {result}")
        bad += result.verdict == SLOWER and result.ratio > options.fail_above
    if not series:
        raise UserError("there is no row to compare")
    print(f"{bad} of {len(series)} rows are slower by more than {number(100 * (options.fail_above - 1))} %, or lost")
    return 1 if bad else 0


class Comparison(NamedTuple):
    """Median times of A and B in seconds, the ratio B/A with its interval, and the ratio of A against itself."""

    a: float
    b: float
    ratio: float
    low: float
    high: float
    noise: float

    @property
    def verdict(self) -> str:
        """Slower or faster where the interval leaves 1 out and the ratio exceeds the noise."""
        if self.low > 1 and self.ratio > self.noise:
            return SLOWER
        return FASTER if self.high < 1 and 1 / self.ratio > self.noise else SAME

    def __str__(self) -> str:
        times = f"{scaled(self.a, SECONDS)}, {scaled(self.b, SECONDS)}"
        ratio = f"B/A {self.ratio:.3f} ({self.low:.3f}–{self.high:.3f})"
        return f"{times}, {ratio}, noise ±{number(100 * (self.noise - 1))} %: {self.verdict}"


def paired(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Compare times measured in turns: a₁, b₁, a₂, b₂, …

    The ratio is the median of bᵢ/aᵢ; the noise that of aᵢ₊₁/aᵢ, at the end of its interval that is farther from 1.
    """
    ratios = [after / before for before, after in zip(a, b, strict=True)]
    least, most = median_interval([after / before for before, after in pairwise(a)])
    return Comparison(median(a), median(b), median(ratios), *median_interval(ratios), max(most, 1 / least))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Two of the values that enclose the median of where they come from, at 95 %; of fewer than 6 the extremes."""
    low, high = quantile_test(values, p=0.5).confidence_interval(0.95)
    return (min(values) if isnan(low) else float(low)), (max(values) if isnan(high) else float(high))


@contextmanager
def checked_out(ref: str) -> Iterator[Path]:
    """A folder with the working tree of a commit, `tree`, and the links that make pspg of it; removed at the end.

    Raises:
        UserError: no such commit, one without these benchmarks, or one with changes that it does not hold.
    """
    commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    if commit is None:
        raise UserError(f"{ref}: is no commit")
    if commit == _git("rev-parse", "HEAD") and _git("status", "--porcelain", "--untracked-files=no"):
        raise UserError(f"{ref}: the working tree has changes that would not be measured; commit or stash them")
    if _git("cat-file", "-e", f"{commit}:benchmarks/run.py") is None:
        raise UserError(f"{ref}: has no benchmarks/run.py; choose a later commit")
    folder = Path(tempfile.mkdtemp(prefix="benchmarks-"))
    try:
        if _git("worktree", "add", "--detach", str(folder / "tree"), commit) is None:
            raise UserError(f"{ref}: git cannot check it out below {folder}; is the disk full?")
        (folder / "links" / "pspg").mkdir(parents=True)
        for name in ("engine", "kernels"):
            (folder / "links" / "pspg" / name).symlink_to(folder / "tree" / name)
        yield folder
    finally:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C leaves nothing, either
        # Forced twice: an interrupted checkout is locked.
        _git("worktree", "remove", "--force", "--force", str(folder / "tree"))
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGINT, before)


def run(folder: Path, arguments: Sequence[str]) -> list[Row]:
    """Rows of `benchmarks.run` in a fresh process that imports the code of a checkout.

    Raises:
        UserError: it does not run.
    """
    paths = [str(folder / "links"), str(folder / "tree"), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "benchmarks.run", *arguments, "--json", str(folder / "rows.json")]
    (folder / "rows.json").unlink(missing_ok=True)
    done = subprocess.run(
        command,
        cwd=folder / "tree",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    if done.returncode == 130:
        raise KeyboardInterrupt
    if not (folder / "rows.json").is_file():
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise UserError(f"its benchmarks do not run: {reason}")
    found: list[Row] = read_results(folder / "rows.json")["rows"]
    return found


def _git(*arguments: str) -> str | None:
    """Output of a git command; None where it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main())

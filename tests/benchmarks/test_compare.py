"""Two commits or two results folders: the statistics, the verdict, and what is left on disk."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.paired import FASTER, SAME, SLOWER, coverage, median_interval, paired, unpaired

from benchmarks import compare
from benchmarks.rows import Row

ROOT = Path(__file__).parents[2]
WriteResults = Callable[..., Path]
SUITE = """
import time
from argparse import ArgumentParser
from pathlib import Path
from pspg.engine.pace import SECONDS
from .rows import Results, Row

JOB = "operators/wait/C2"


def main():
    parser = ArgumentParser()
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--device")
    options = parser.parse_args()
    if options.list:
        print(JOB)
        return
    options.output.mkdir(exist_ok=True)
    time.sleep(SLEEP)
    row = Row(job=JOB, suite="operators", operator="wait", provider="eager", p20=SECONDS, p50=SECONDS, p80=SECONDS)
    Results(options.output, {}).add([row])


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits; the engine of the second takes twice as long, by the suite's word."""
    root = tmp_path / "repository"
    for folder in ("engine", "kernels", "benchmarks"):
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").touch()
    for name in ("errors", "files"):
        shutil.copy(ROOT / "engine" / f"{name}.py", root / "engine")
    for name in ("rows", "present", "paired", "checkout", "compare"):
        shutil.copy(ROOT / "benchmarks" / f"{name}.py", root / "benchmarks")
    (root / "benchmarks" / "suite.py").write_text(SUITE.replace("SLEEP", "0"))
    (root / ".gitignore").write_text("__pycache__/\n")
    git(root, "init", "--quiet")
    for seconds in (1.0, 2.0):
        (root / "engine" / "pace.py").write_text(f"SECONDS = {seconds}\n")
        commit(root)
    return root


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "m")


def start(repository: Path, *arguments: str) -> subprocess.Popen[str]:
    temporary = repository.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.compare", *arguments],
        cwd=repository,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(repository: Path, *arguments: str) -> tuple[int, str, str]:
    """Status, output and errors; nothing may be left behind."""
    process = start(repository, *arguments)
    out, err = process.communicate()
    assert_nothing_left(repository)
    return process.returncode, out, err


def assert_nothing_left(repository: Path) -> None:
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert not list((repository.parent / "temporary").iterdir())


def test_each_commit_runs_its_own_code(repository: Path) -> None:
    status, out, err = run(repository, "HEAD~1", "HEAD", "--pairs", "3")
    assert status == 1, err
    assert "operators/wait/C2 eager both" in out
    assert out.count(" 2.000 ") == 1
    assert out.count(SLOWER) == 2
    assert run(repository, "HEAD", "HEAD~1", "--pairs", "3")[0] == 0


def test_a_commit_is_as_fast_as_itself(repository: Path) -> None:
    status, out, err = run(repository, "HEAD", "HEAD", "--pairs", "3")
    assert status == 0, err
    assert SAME in out


def test_what_cannot_be_measured_is_refused(repository: Path) -> None:
    git(repository, "rm", "-r", "--quiet", "kernels")
    commit(repository)
    assert "pspg.kernels comes from" in assert_refused(repository, "HEAD~1", "HEAD")
    git(repository, "mv", "benchmarks/suite.py", "benchmarks/other.py")
    commit(repository)
    assert "benchmarks/suite.py" in assert_refused(repository, "HEAD~2", "HEAD")
    assert "neither a commit" in assert_refused(repository, "HEAD~1", "nowhere")
    assert "no commit holds" in assert_refused(repository, "HEAD~1", "0123abc-dirty")
    assert "give two commits or two folders" in assert_refused(repository, "HEAD~1", "engine")
    (repository / "engine" / "pace.py").write_text("SECONDS = 3.0\n")
    assert "commit or stash" in assert_refused(repository, "HEAD~3", "HEAD")


def test_a_commit_that_breaks_or_writes_other_rows_is_refused(repository: Path) -> None:
    suite = repository / "benchmarks" / "suite.py"
    suite.write_text(suite.read_text().replace("time.sleep", "time.slip"))
    commit(repository)
    assert "has no attribute 'slip'" in assert_refused(repository, "HEAD~1", "HEAD")
    git(repository, "revert", "--no-edit", "HEAD")
    rows = repository / "benchmarks" / "rows.py"
    rows.write_text(rows.read_text().replace("repeats: int", "turns: int"))
    commit(repository)
    git(repository, "revert", "--no-edit", "HEAD")
    assert "another version" in assert_refused(repository, "HEAD", "HEAD~1")


def assert_refused(repository: Path, *arguments: str) -> str:
    status, _, err = run(repository, *arguments)
    assert status == 2
    assert len(err.splitlines()) == 1
    return err


def test_nothing_is_left_after_an_interrupt(repository: Path) -> None:
    (repository / "benchmarks" / "suite.py").write_text(SUITE.replace("SLEEP", "60"))
    commit(repository)
    process = start(repository, "HEAD", "HEAD")
    deadline = time.monotonic() + 60
    while not list((repository.parent / "temporary").glob("*/results-0")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert_nothing_left(repository)


@pytest.mark.slow
def test_the_real_suite_in_two_commits(tmp_path: Path) -> None:
    """This tree's own suite, with one job of no cost."""
    root = tmp_path / "repository"
    for folder in ("engine", "kernels", "benchmarks"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    suite = root / "benchmarks" / "suite.py"
    fake = "from .cheap import jobs\n\n\ndef all_jobs(device): return jobs()\n\n\nif __name__ =="
    suite.write_text(suite.read_text().replace("if __name__ ==", fake))
    (root / "benchmarks" / "cheap.py").write_text(
        "from .rows import Row\n"
        "class Cheap:\n"
        "    key, rank = 'operators/cheap/C2', 0\n"
        "    def run(self, device, without, started):\n"
        "        times = dict(p20=1.0, p50=1.0, p80=1.0)\n"
        "        return [Row(job=self.key, suite='operators', operator='cheap', provider='eager', **times)]\n"
        "def jobs(): return [Cheap()]\n"
    )
    (root / ".gitignore").write_text("__pycache__/\n")
    git(root, "init", "--quiet")
    commit(root)
    status, out, err = run(root, "HEAD", "HEAD", "--pairs", "3", "--device", "cpu")
    assert status == 0, err
    assert "operators/cheap/C2 eager both" in out


def test_folders(write_results: WriteResults, rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    """Ranges that do not overlap make a row slower, and so does a number that is lost."""
    same = [row for row in rows if row.suite == "operators"]
    double = [replace(row, p20=2 * row.p20, p50=2 * row.p50, p80=2 * row.p80) if row.p50 else row for row in same[:1]]
    failed = [replace(row, status="FAILED", detail="wrong") for row in same[1:2]]
    a, b = str(write_results("a", same)), str(write_results("b", [*double, *same[1:]]))
    assert compare.main([a, a]) == 0
    assert "measured at different times" in capsys.readouterr().out
    assert compare.main([a, b]) == 1
    assert compare.main([a, b, "--fail_above", "3"]) == 0
    assert compare.main([b, a]) == 0
    assert FASTER in capsys.readouterr().out
    assert compare.main([a, str(write_results("c", [*same[:1], *failed, *same[2:]]))]) == 1
    assert "repaired both: measured, then FAILED (wrong)" in capsys.readouterr().out
    assert compare.main([str(write_results("d", same[1:2])), str(write_results("e", failed))]) == 1
    assert compare.main([a, a, "--only", "nothing"]) == 2


def test_folders_of_different_devices_are_refused(
    write_results: WriteResults, rows: list[Row], capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_results("a", rows)
    b = write_results("b", rows, machine={"processor": "Abacus 4", "threads": 2})
    assert compare.main([str(a), str(b)]) == 2
    assert "different devices" in capsys.readouterr().err


def test_coverage_of_the_order_statistics() -> None:
    """Of 9 values the second and the second but last enclose the median in 1 − 2·10/512 of all cases."""
    assert median_interval([5, 1, 2, 3, 4, 6, 7, 8, 9]) == (2, 8)
    assert coverage(9) == 1 - 20 / 512
    assert coverage(6) == 1 - 2 / 64
    assert median_interval([3, 1, 2]) == (1, 3)
    draw = random.Random(0)
    hits = 0
    for _ in range(2000):
        low, high = median_interval([draw.gauss(0, 1) for _ in range(9)])
        hits += low <= 0 <= high
    assert hits / 2000 == pytest.approx(coverage(9), abs=0.015)


def series(draw: random.Random, factor: float, count: int = 9) -> list[float]:
    return [factor * draw.lognormvariate(0, 0.01) for _ in range(count)]


def test_verdicts_on_noisy_series() -> None:
    """A tenth slower is seen through noise of 1 %; nothing is seen where there is nothing, but for a few in 200."""
    draw = random.Random(1)
    assert all(paired(series(draw, 1), series(draw, 1.1)).verdict == SLOWER for _ in range(200))
    assert all(paired(series(draw, 1), series(draw, 0.9)).verdict == FASTER for _ in range(200))
    assert sum(paired(series(draw, 1), series(draw, 1)).verdict != SAME for _ in range(200)) <= 10


def test_a_drift_of_the_machine_is_no_difference() -> None:
    """It slows down from run to run: each B is slower than its A, and each A than the A before."""
    runs = [1.03**k for k in range(18)]
    assert paired(runs[::2], runs[1::2]).verdict == SAME


def test_unpaired_ranges() -> None:
    assert unpaired((0.9, 1.0, 1.1), (1.05, 1.2, 1.3)).verdict == SAME
    assert unpaired((0.9, 1.0, 1.1), (1.15, 1.2, 1.3)).verdict == SLOWER
    assert unpaired((0.9, 1.0, 1.1), (0.7, 0.8, 0.85)).verdict == FASTER
    assert unpaired((0.0, 1.0, 1.1), (0.0, 0.8, 0.85)).verdict == SAME

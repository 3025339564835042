"""Two commits in turns: the statistics, the verdict, and what is left on disk."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.compare import FASTER, SAME, SLOWER, median_interval, paired

ROOT = Path(__file__).parents[2]
RUN = """
import sys, time
from pathlib import Path
from pspg.engine.pace import SECONDS
import pspg.kernels
from .rows import Row, write_results

time.sleep(SLEEP)
arguments = sys.argv[1:]
assert arguments[:2] == ["--op", "wait"]
row = Row(job="operators/wait/C2", operator="wait", impl="eager", sizes={"C": 2}, p20=SECONDS, p50=SECONDS, p80=SECONDS)
write_results(Path(arguments[arguments.index("--json") + 1]), {"environment": {}, "rows": [row]})
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits; the engine of the second takes twice as long, by the word of its benchmark."""
    root = tmp_path / "repository"
    for folder in ("engine", "kernels"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "benchmarks").mkdir()
    for name in ("rows", "tables", "command", "compare"):
        shutil.copy(ROOT / "benchmarks" / f"{name}.py", root / "benchmarks")
    (root / "benchmarks" / "__init__.py").touch()
    (root / "benchmarks" / "run.py").write_text(RUN.replace("SLEEP", "0"))
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
        [sys.executable, "-m", "benchmarks.compare", *arguments, "--op", "wait"],
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
    status, out, err = run(repository, "HEAD~1", "HEAD")
    assert status == 1, err
    assert "wait C2 fp32 eager both: 1 s, 2 s, B/A 2.000 (2.000–2.000), noise ±0 %: slower" in out
    assert "1 of 1 rows are slower by more than 5 %" in out
    assert run(repository, "HEAD~1", "HEAD", "--fail_above", "3")[0] == 0


def assert_refused(repository: Path, *arguments: str) -> str:
    status, _, err = run(repository, *arguments)
    assert status == 2
    assert len(err.splitlines()) == 1
    return err


def test_what_cannot_be_measured_is_refused(repository: Path) -> None:
    benchmark = repository / "benchmarks" / "run.py"
    benchmark.write_text(RUN.replace("time.sleep", "time.slip"))
    commit(repository)
    assert "has no attribute 'slip'" in assert_refused(repository, "HEAD~1", "HEAD")
    git(repository, "rm", "--quiet", "benchmarks/run.py")
    commit(repository)
    assert "benchmarks/run.py" in assert_refused(repository, "HEAD~2", "HEAD")
    assert "is no commit" in assert_refused(repository, "HEAD~2", "nowhere")
    assert "printed only" in assert_refused(repository, "HEAD~2", "HEAD~2", "--json=out")
    (repository / "engine" / "pace.py").write_text("SECONDS = 3.0\n")
    assert "commit or stash" in assert_refused(repository, "HEAD", "HEAD~2")


def test_nothing_is_left_after_an_interrupt(repository: Path) -> None:
    (repository / "benchmarks" / "run.py").write_text(RUN.replace("SLEEP", "60"))
    commit(repository)
    process = start(repository, "HEAD", "HEAD")
    deadline = time.monotonic() + 60
    while len(list((repository.parent / "temporary").glob("*/links"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert_nothing_left(repository)


def test_coverage_of_the_order_statistics() -> None:
    """Of 9 values the second and the second but last enclose the median in 1 − 2·10/512 of all cases."""
    assert median_interval([5, 1, 2, 3, 4, 6, 7, 8, 9]) == (2, 8)
    assert median_interval([5, 1, 2, 3, 4, 6]) == (1, 6)
    assert median_interval([3, 1, 2]) == (1, 3)
    draw = random.Random(0)
    intervals = [median_interval([draw.gauss(0, 1) for _ in range(9)]) for _ in range(2000)]
    assert sum(low <= 0 <= high for low, high in intervals) / 2000 == pytest.approx(1 - 20 / 512, abs=0.015)


def test_verdicts_on_noisy_series() -> None:
    """A tenth slower is seen through noise of 1 %; nothing is seen where there is nothing, but for a few in 200."""
    draw = random.Random(1)

    def verdicts(factor: float) -> list[str]:
        pairs = [[[f * draw.lognormvariate(0, 0.01) for _ in range(9)] for f in (1, factor)] for _ in range(200)]
        return [paired(a, b).verdict for a, b in pairs]

    assert set(verdicts(1.1)) == {SLOWER}
    assert set(verdicts(0.9)) == {FASTER}
    assert verdicts(1).count(SAME) >= 190
    drift = [1.03**k for k in range(18)]  # each B is slower than its A, and each A than the A before
    assert paired(drift[::2], drift[1::2]).verdict == SAME

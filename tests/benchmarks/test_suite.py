"""The suite keeps what it has measured, continues, survives a job that dies, and says when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from benchmarks.suite import Runner, with_roofline

from benchmarks import suite
from benchmarks.harness import Measured, Unavailable, take_turns
from benchmarks.rows import FAILED, OK, TOO_LARGE, UNAVAILABLE, Results, Row, read_rows
from pspg.engine.errors import UserError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ENVIRONMENT = {"device": "cpu", "machine": {"cores": 2}, "versions": {"torch": "1"}, "commit": "abc"}


@dataclass(frozen=True)
class Fake:
    """Two providers, the second of which may do harm."""

    key: str
    harm: str = ""
    rank: int = 0

    def run(self, device: torch.device, without: Mapping[str, str], started: Callable[[str], None]) -> list[Row]:
        rows = []
        for provider in ("eager", "triton"):
            row = Row(job=self.key, suite="operators", operator="fake", provider=provider)
            if provider in without:
                rows.append(replace(row, status=TOO_LARGE, detail=without[provider]))
                continue
            started(provider)
            if provider == "triton" and self.harm == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if provider == "triton" and self.harm == "sleep":
                time.sleep(600)
            if provider == "triton" and self.harm == "raise":
                raise ValueError("broken\nmore")
            status = FAILED if provider == "triton" and self.harm == "wrong" else OK
            rows.append(replace(row, status=status, p50=0.1 if status == OK else None, detail=str(os.getpid())))
        return rows


def test_a_killed_provider_does_not_fit_and_the_others_are_measured() -> None:
    runner = Runner(CPU)
    rows = runner.run(Fake("operators/fake/a", "kill"), None)
    assert rows is not None
    assert [row.status for row in rows] == [OK, TOO_LARGE]
    assert "status -9" in rows[1].detail
    rows = runner.run(Fake("operators/fake/b", "raise"), None)
    assert rows is not None
    assert [(row.status, row.detail) for row in rows] == [(FAILED, "ValueError: broken")]
    begin = time.monotonic()
    assert runner.run(Fake("operators/fake/c", "sleep"), begin + 15) is None
    assert time.monotonic() - begin < 30
    runner.close()


def test_after_a_failure_jobs_have_another_process() -> None:
    """On a GPU, where one serves all jobs: a broken kernel can leave its context unusable."""
    runner = Runner(torch.device("meta"))
    processes = []
    for harm in ("", "", "wrong", ""):
        rows = runner.run(Fake("operators/fake/a", harm), None)
        assert rows is not None
        processes.append(rows[0].detail)
    runner.close()
    first, second, third, fourth = processes
    assert first == second == third
    assert fourth != third


def test_a_wrong_row_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [Fake("operators/fake/a"), Fake("operators/fake/b", "wrong")]
    monkeypatch.setattr(suite, "all_jobs", lambda device: jobs)
    monkeypatch.setattr(suite, "measure_peaks", lambda device: {"fp32": 1e9, "bandwidth": 1e9})
    out = tmp_path / "out"
    assert suite.main(["--device", "cpu", "--output", str(out), "--only", "fake/a"]) == 0
    assert suite.main(["--device", "cpu", "--output", str(out)]) == 1
    said = capsys.readouterr()
    assert "FAILED: operators/fake/b triton" in said.err
    assert "[1/1" in said.err.split("FAILED")[0].rsplit("operators/fake/a", 1)[-1]  # the first was not run again
    assert "100 ms" in said.out
    assert [row.job for row in read_rows(out)] == ["operators/fake/a"] * 2 + ["operators/fake/b"] * 2
    assert len((out / "rows.csv").read_text().splitlines()) == 5
    assert suite.main(["--device", "cpu", "--output", str(out), "--only", "nothing"]) == 2


def test_nothing_runs_once_the_budget_is_spent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "all_jobs", lambda device: [Fake("operators/fake/a")])
    monkeypatch.setattr(suite, "measure_peaks", lambda device: {})
    assert suite.main(["--device", "cpu", "--output", str(tmp_path / "out"), "--budget_s", "0"]) == 0
    assert "1 of 1 jobs are left" in capsys.readouterr().err


def test_results_of_another_environment_are_not_mixed(tmp_path: Path) -> None:
    row = Row(job="operators/fake/a", suite="operators", operator="fake", provider="eager", p50=1.0)
    Results(tmp_path / "out", ENVIRONMENT).add([row])
    assert Results(tmp_path / "out", ENVIRONMENT).rows == [row]
    for key in ENVIRONMENT:
        with pytest.raises(UserError, match=f"another {key}"):
            Results(tmp_path / "out", {**ENVIRONMENT, key: "other"})
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not a folder of results"):
        Results(tmp_path / "else", ENVIRONMENT)
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    (tmp_path / "out" / "rows.json").write_text(json.dumps([{**rows[0], "unknown": 1}]))
    with pytest.raises(UserError, match="another version"):
        read_rows(tmp_path / "out")


def test_turns_are_taken_and_slow_calls_repeated_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.SECONDS", 1.0)
    order: list[str] = []

    def provider(name: str, seconds: float, error: Exception | None = None) -> Callable[[], Callable[[int], dict]]:
        def call(turn: int) -> dict[str, float]:
            order.append(name)
            if error is not None:
                raise error
            return {"both": seconds}

        return lambda: call

    def missing() -> Callable[[int], dict[str, float]]:
        raise Unavailable("no compiler")

    found = take_turns(
        {
            "slow": provider("slow", 11.0),
            "slower": provider("slower", 31.0),
            "fast": provider("fast", 0.1),
            "large": provider("large", 0.1, RuntimeError("[enforce fail] not enough memory: you tried to allocate")),
            "missing": missing,
        },
        CPU,
    )
    assert found["slow"].times == {"both": [11.0] * 3}
    assert found["slower"].times == {"both": [31.0] * 2}
    assert found["fast"].times == {"both": [0.1] * 10}
    assert order[:9] == ["slow", "slower", "fast", "large", "slow", "slower", "fast", "slow", "fast"]
    assert (found["large"].status, found["missing"].status) == (TOO_LARGE, UNAVAILABLE)
    row = Row(job="a/b", suite="a", operator="b", provider="slow")
    assert [r.p50 for r in found["slow"].rows(row, ("both",))] == [11.0]
    assert [(r.p50, r.detail) for r in found["missing"].rows(row, ("both",))] == [(None, "no compiler")]
    found = take_turns({"wrong": provider("wrong", 1, RuntimeError("a bug")), "right": provider("right", 11.0)}, CPU)
    assert (found["wrong"].status, found["wrong"].detail) == (FAILED, "RuntimeError: a bug")
    assert found["right"].status is None


def test_share_of_the_roofline() -> None:
    peaks = {"fp32": 100.0, "bandwidth": 10.0}
    row = Row(job="a/b", suite="a", operator="b", provider="eager", p50=4.0, flops=100, bytes=20)
    assert with_roofline(row, peaks).roofline == 0.5  # 2 s for the bytes, 1 s for the products
    assert with_roofline(replace(row, flops=300), peaks).roofline == 0.75
    assert with_roofline(replace(row, status=FAILED), peaks).roofline is None
    assert Measured(status=UNAVAILABLE, detail="x").rows(row, ("both",))[0].p50 is None


@pytest.mark.slow
def test_an_interrupted_run_continues(tmp_path: Path) -> None:
    """Ctrl-C after the first job: its rows are on disk, and the next run does the others."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.suite", "--device", "cpu", "--output", str(out)]
    command += ["--only", "asymmetric_loss", "add_norm/C14"]
    environment = {**os.environ, "CXX": "/nonexistent", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not (out / "rows.json").is_file():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "2 of 3 jobs are left" in said
    assert "Traceback" not in said
    first = read_rows(out)
    assert len({row.job for row in first}) == 1
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = read_rows(out)
    assert rows[: len(first)] == first
    assert len({row.job for row in rows}) == 3
    assert all(row.p50 for row in rows if row.provider in ("reference", "repaired", "eager"))
    assert {row.status for row in rows if row.provider == "compiled"} == {UNAVAILABLE}

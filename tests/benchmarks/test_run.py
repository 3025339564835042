"""The command: names and sizes from the shell, one line for a mistake, rows that are kept."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from benchmarks import jobs, run
from benchmarks.jobs import make_job, registry, standard_jobs
from benchmarks.operators import OPERATORS
from benchmarks.rows import read_results
from pspg.engine.utils.errors import UserError

ASL = ["--op", "asymmetric_loss", "--device", "cpu", "--shape", "C=3,B=2"]


@pytest.fixture(autouse=True)
def _quick(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "peaks_of", jobs.peaks_of)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--op", "spc"], "choose from prompt_decoder, spcl"),
        ([*ASL[:4], "--shape", "C=3,Q=2"], "it has C=108, B=64"),
        ([*ASL[:4], "--shape", "C=three"], "LETTER=SIZE"),
        ([*ASL[:4], "--shape", "C=1"], "C=1 is below 2"),
        (["--op", "spcl", "--shape", "n=38", "--device", "cpu"], "37 is the most"),
        (["--op", "spcl", "--shape", "W=20", "--device", "cpu"], "8 heads do not divide W=20"),
        ([*ASL, "--impl", "fastest"], "has reference, repaired, eager, compiled, triton"),
        ([*ASL, "--direction", "up"], "has forward, backward, both"),
        ([*ASL, "--dtype", "int8"], "has fp32, bf16, fp16"),
        (["--op", "spcl", "--device", "tpu"], "choose from auto, cpu, cuda"),
        (["--impl", "eager"], "give --op, too"),
        ([*ASL, "--only", "spcl"], "leave out --op"),
        (["--only", "nothing", "--device", "cpu"], "no standard job has such a key"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        ([*ASL, "--json", "README.md/out.json"], "README.md"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert said in err


def test_table_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([*ASL, "--json", str(tmp_path / "new" / "out.json"), "--commit", "abc"]) == 0
    out, err = capsys.readouterr()
    assert "operators/asymmetric_loss/C3-B2-fp32" in err
    assert "unavailable (kernels need a GPU" in out
    content = read_results(tmp_path / "new" / "out.json")
    assert content["environment"]["commit"] == "abc"
    assert [row.impl for row in content["rows"] if row.direction == "both"] == [
        "reference",
        "repaired",
        "eager",
        "triton",
    ]
    (line,) = [line for line in out.splitlines() if "repaired" in line and "both" in line]
    assert " 1× " in line


def test_several_sizes_are_a_curve(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--shape", "C=8,16,512,1024,2048,B=64", "--impl", "eager", "--direction", "both", "forward"]
    assert run.main([*ASL[:4], *shape]) == 0
    assert "asymmetric_loss eager forward: time ~ C^" in capsys.readouterr().out


def test_a_wrong_row_is_the_exit_status_and_what_is_done_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any) -> Any:
        raise ValueError("broken\nmore")

    chosen = [make_job("asymmetric_loss", {"C": C, "B": 2}, "cpu") for C in (3, 4)]
    monkeypatch.setattr(run, "standard_jobs", lambda device: chosen)
    command = ["--device", "cpu", "--output", str(tmp_path / "out")]
    assert run.main([*command, "--budget_s", "0"]) == 0
    assert "2 of 2 jobs are left" in capsys.readouterr().err
    assert run.main([*command, "--only", "C3"]) == 0
    first = read_results(tmp_path / "out" / "results.json")
    monkeypatch.setattr(jobs, "OperatorCase", broken)
    assert run.main(command) == 1
    out, err = capsys.readouterr()
    assert "[1/1" in err
    assert "FAILED (ValueError: broken): asymmetric_loss" in out
    assert read_results(tmp_path / "out" / "results.json")["rows"][: len(first["rows"])] == first["rows"]
    assert run.main([*command, "--commit", "other"]) == 2
    assert "another commit" in capsys.readouterr().err


def test_what_is_no_results_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    rows = json.dumps({"environment": {}, "rows": [{"unknown": 1}]})
    for text, reason in (("{", "not JSON"), ("{}", "not a results file"), (rows, "not a results file")):
        path.write_text(text)
        with pytest.raises(UserError, match=reason):
            read_results(path)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_standard_jobs_are_distinct_and_measure_everything(device: str) -> None:
    found = standard_jobs(device)
    assert len({job.key for job in found}) == len(found)
    assert pickle.loads(pickle.dumps(found)) == found
    assert {job.op for job in found} == registry()[0].keys() > OPERATORS.keys()


def test_list_names_letters_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "C=108,B=64,n=16,W=512,layers=12,heads=8,D=1024" in out
    assert "growth/text_side/C" in out

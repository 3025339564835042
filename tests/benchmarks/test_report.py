"""Tables of measured rows, and their place in a README."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.rows import Row

WriteResults = Callable[..., Path]
README = (
    "# Speed\n\n<!-- results: {name} -->\nold\n<!-- end -->\n\nBelow.\n\n<!-- results: other -->\nkept\n<!-- end -->\n"
)


@pytest.fixture
def results(rows: list[Row], write_results: WriteResults) -> Path:
    return write_results("mine", [row for row in rows if row.suite != "growth"])


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(README.format(name="mine"))
    return path


def line(text: str, *cells: str) -> list[str]:
    """Cells of the one line of a table that begins with these."""
    (found,) = [one for one in text.splitlines() if one.startswith(f"| {' | '.join(cells)} |")]
    return [cell.strip() for cell in found.split("|")[1:-1]]


def test_tables_hold_the_numbers(results: Path, tmp_path: Path) -> None:
    text = report.markdown(results, tmp_path)
    head, cells = line(text, "", "case", "reference"), line(text, "pair_loss", "C14 B8 n16 fp32")
    found = dict(zip(head[2:], cells[2:], strict=True))
    assert found == {
        "reference": "8 ms (7.2–9.6)",
        "repaired": "4 ms (3.6–4.8)",
        "eager": "1 ms (0.9–1.2)",
        "compiled": "FAILED",
        "triton": "unavailable",
        "fastest": "eager",
        "against repaired": "4×",
        "of roofline": "50 %",
        "peak memory": "1 MiB (repaired 1 MiB)",
    }
    assert line(text, "pair_loss", "C193 B8 n16 fp32")[2] == "does not fit"
    assert line(text, "phase2_step", "C14 B8 n16 fp32")[2] == "1 ms (0.9–1.2)"


def test_says_where_numbers_come_from_and_why_some_are_missing(results: Path, tmp_path: Path) -> None:
    text = report.markdown(results, tmp_path)
    assert "- on: Abacus 3, 2 threads; python 3.11.7; torch 2.11.0; commit 0123456789ab\n" in text
    assert "- measured peaks: fp32 1 TFLOP/s, memory 100 GB/s\n" in text
    assert f"`python -m benchmarks.suite --device cpu --output {results}`" in text
    assert "- FAILED (gradient of V: 3 times what is allowed): pair_loss compiled (C14 B8 n16 fp32)\n" in text


def test_growth(monkeypatch: pytest.MonkeyPatch, results: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "fits_of", lambda rows: [("text_side", "sampled", "C", 1.04, (32, 500))])
    assert line(report.markdown(results, tmp_path), "text_side")[1:] == ["sampled", "C^1.04", "C = 32 … 500"]


def test_readme_is_rewritten_between_its_markers(results: Path, readme: Path) -> None:
    (results / "plots").mkdir()
    (results / "plots" / "steps-memory.png").touch()
    assert report.main([str(results), "--readme", str(readme)]) == 0
    first = readme.read_text()
    before, _, rest = first.partition("<!-- results: mine -->\n")
    inside, _, after = rest.partition("<!-- end -->")
    assert before + "<!-- results: mine -->\nold\n<!-- end -->" + after == README.format(name="mine")
    assert "old" not in inside
    assert "| pair_loss |" in inside
    assert "![steps-memory](mine/plots/steps-memory.png)" in inside
    assert report.main([str(results), "--readme", str(readme)]) == 0
    assert readme.read_text() == first


def test_what_a_cell_cannot_hold_is_escaped(write_results: WriteResults, rows: list[Row], tmp_path: Path) -> None:
    machine = {"processor": "<b>a|b</b> * $`", "threads": 2}
    text = report.markdown(write_results("odd", rows[:1], machine=machine), tmp_path)
    assert r"\<b\>a\|b\</b\> \* $\`" in text


@pytest.mark.parametrize(
    "text", ["no markers", "<!-- results: mine -->\n", README.format(name="mine") + README.format(name="mine")]
)
def test_a_readme_without_its_markers_is_left_alone(
    text: str, results: Path, readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme.write_text(text)
    assert report.main([str(results), "--readme", str(readme)]) == 2
    assert "<!-- results: mine -->" in capsys.readouterr().err
    assert readme.read_text() == text


def test_without_a_readme_it_is_printed(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(results)]) == 0
    assert "### Operators" in capsys.readouterr().out


def test_missing_files_end_in_a_line(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path / "nothing")]) == 2
    assert report.main([str(results), "--readme", str(tmp_path / "none.md")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2

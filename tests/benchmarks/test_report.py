"""Tables, growth and pictures of measured rows, and their place in a README."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.rows import write_results
from benchmarks.tables import fits, lines_of

from .conftest import ENVIRONMENT, row, rows

README = "# Speed\n\n<!-- results: mine -->\nold\n<!-- end -->\n\n<!-- results: other -->\nkept\n<!-- end -->\n"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    odd = {**ENVIRONMENT, "machine": {"processor": "<b>a|b</b> * $`", "threads": 2}}
    write_results(tmp_path / "mine" / "results.json", {"environment": odd, "rows": rows()})
    return tmp_path / "mine"


def test_a_readme_is_rewritten_between_its_markers(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README)
    assert report.main([str(results), "--readme", str(readme)]) == 0
    first = readme.read_text()
    before, rest = first.split("<!-- results: mine -->\n")
    inside, after = rest.split("<!-- end -->", 1)
    assert before + "<!-- results: mine -->\nold\n<!-- end -->" + after == README
    assert "| pair_loss | C14 B8 fp32 | 8 ms | 4 ms | 1 ms | FAILED | eager | 4× | 50 % | 1 MiB |" in inside
    assert r"\<b\>a\|b\</b\> \* $\`" in inside
    assert "text_side eager: time ~ C^2.00 for 8 ≤ C ≤ 16" not in inside  # two points are no curve
    assert "![growth](mine/growth.png)" in inside
    pictures = {path.name: path.read_bytes() for path in results.glob("*.png")}
    assert pictures.keys() == {"growth.png"}
    assert report.main([str(results), "--readme", str(readme)]) == 0
    assert readme.read_text() == first
    assert {path.name: path.read_bytes() for path in results.glob("*.png")} == pictures


@pytest.mark.parametrize("text", ["no markers", "<!-- results: mine -->\n", README + README])
def test_a_readme_without_its_markers_is_left_alone(
    text: str, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text(text)
    assert report.main([str(results), "--readme", str(tmp_path / "README.md")]) == 2
    assert "<!-- results: mine -->" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == text


def test_no_results_end_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_exponents_are_those_of_the_upper_part() -> None:
    """Constant up to 16, then quadratic; the largest point failed."""
    curve = [row(milliseconds=max(C, 16) ** 2, job="growth/a/C", sizes={"C": C}) for C in (2, 4, 8, 16, 32, 64, 128)]
    failed = row(job="growth/a/C", sizes={"C": 500}).without_numbers("FAILED", "wrong")
    (fit,) = fits([*curve, failed])
    assert (fit.low, fit.high) == (16, 128)
    assert fit.exponent == pytest.approx(2)


def test_a_difference_of_two_times_may_be_zero() -> None:
    """As that of a backward which is measured as the whole less the forward."""
    assert lines_of([row(milliseconds=0.0)])[0][4] == "no time"


@pytest.mark.parametrize("name", [path.name for path in RESULTS.iterdir()])
def test_what_the_guide_shows_comes_from_the_committed_results(name: str) -> None:
    folder = RESULTS / name
    assert len(list(folder.iterdir())) <= 4
    guide = RESULTS.parent / "README.md"
    pictures = [folder / f"{picture}.png" for picture in ("growth", "scaling")]
    content = report.read_results(folder / "results.json")
    assert report.markdown(content, [path for path in pictures if path.is_file()], guide.parent) in guide.read_text()

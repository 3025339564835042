"""Figures show what was measured and name what was not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from benchmarks import plots
from benchmarks.rows import Row, read_environment

WriteResults = Callable[..., Path]
FIT = ("text_side", "eager", "C", 2.0, (2, 8))


@pytest.fixture
def environment(rows: list[Row], write_results: WriteResults) -> dict[str, object]:
    return read_environment(write_results("results", rows))


def of(rows: list[Row], suite: str) -> list[Row]:
    return [row for row in rows if row.suite == suite]


def axes_named(figure: Figure, title: str) -> Axes:
    (axes,) = [axes for axes in figure.findobj(Axes) if title in {axes.get_title(loc) for loc in ("left", "center")}]
    return axes


def points(axes: Axes) -> set[tuple[float, str]]:
    """(x, provider) of every dot, the provider by its colour."""
    names = {colour: name for name, colour in plots.COLOURS.items()}
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    return {(float(line.get_xdata()[0]), names[line.get_color()]) for line in dots}


def words(figure: Figure) -> str:
    """All text of a figure, its line breaks undone."""
    return " ".join(" ".join(text.get_text().split()) for text in figure.findobj(Text))


def test_latency_draws_the_measured_rows_and_names_the_others(rows: list[Row], environment: dict) -> None:
    figure = plots.latency(of(rows, "operators"), "both", environment)
    measured = {(row.p50, row.provider) for row in of(rows, "operators") if row.p50 is not None}
    assert points(axes_named(figure, "pair_loss")) == measured
    said = words(figure)
    for line in (
        "FAILED (gradient of V: 3 times what is allowed): pair_loss compiled (C14 B8 n16 fp32)",
        "unavailable (needs a GPU): pair_loss triton (C14 B8 n16 fp32)",
        "does not fit (out of memory): pair_loss reference (C193 B8 n16 fp32)",
    ):
        assert line in said


def test_numbers_of_a_failed_row_are_not_drawn(rows: list[Row], environment: dict) -> None:
    wrong = replace(rows[2], status="FAILED", detail="wrong")
    assert wrong.p50 is not None
    figure = plots.latency([rows[0], wrong], "both", environment)
    assert points(axes_named(figure, "pair_loss")) == {(rows[0].p50, "reference")}
    assert "FAILED (wrong): pair_loss eager" in words(figure)


def test_a_difference_of_two_times_may_be_zero(rows: list[Row], environment: dict) -> None:
    """As that of a backward which is measured as the whole less the forward."""
    low, nothing = replace(rows[0], p20=0.0), replace(rows[1], p20=0.0, p50=0.0, p80=0.0)
    figure = plots.latency([low, nothing, rows[2]], "both", environment)
    figure.draw_without_rendering()
    axes = axes_named(figure, "pair_loss")
    assert points(axes) == {(row.p50, row.provider) for row in (low, rows[2])}
    assert axes.get_xlim()[0] > rows[2].p50 / 100
    assert "no time: pair_loss repaired" in words(figure)


def test_what_has_one_direction_is_drawn_with_the_others(rows: list[Row], environment: dict) -> None:
    """Evaluation has no backward; a pair loss has three directions, of which the figure shows one."""
    scored = replace(rows[2], operator="evaluation", direction="forward")
    half = replace(rows[2], direction="forward", p50=0.0005)
    figure = plots.latency([*rows[:3], half, scored], "both", environment)
    assert points(axes_named(figure, "evaluation, forward")) == {(scored.p50, "eager")}
    assert points(axes_named(figure, "pair_loss")) == {(row.p50, row.provider) for row in rows[:3]}
    alone = plots.latency([*rows[:3], half, scored], "forward", environment)
    assert points(axes_named(alone, "pair_loss")) == {(half.p50, "eager")}


def test_speed_up_is_the_ratio_of_medians(rows: list[Row], environment: dict) -> None:
    figure = plots.speed_ups(of(rows, "operators"), "repaired", environment)
    drawn = [line for line in axes_named(figure, "pair_loss").lines if line.get_marker() == "o"]
    ratios = sorted(float(line.get_xdata()[0]) for line in drawn)
    assert ratios == pytest.approx([0.5, 0.5, 4, 4])
    assert "no time of repaired to compare with: pair_loss C193 B8 n16 fp32" in words(figure)


def test_memory_marks_the_goal_of_the_step_alone(rows: list[Row], environment: dict) -> None:
    def dashed(figure: Figure) -> list[float]:
        lines = [line for line in figure.findobj(Line2D) if line.get_linestyle() == "--"]
        return [float(line.get_xdata()[0]) for line in lines]

    step = plots.memory(of(rows, "steps"), environment)
    assert dashed(step) == [plots.GOAL]
    assert "3.1 GiB, the goal" in words(step)
    assert points(axes_named(step, "phase2_step")) == {(2**32, "eager")}
    assert not dashed(plots.memory(of(rows, "operators"), environment))


def test_roofline_shows_the_measured_peaks(rows: list[Row], environment: dict) -> None:
    figure = plots.roofline(of(rows, "operators"), environment)
    (axes,) = figure.findobj(Axes)
    (roof,) = [line for line in axes.lines if line.get_marker() == "None"]
    assert list(roof.get_ydata())[1:] == [1e12, 1e12]
    assert list(roof.get_xdata())[1] == 10
    dots = {(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines if line is not roof}
    assert dots == {(10, 1e6 / row.p50) for row in of(rows, "operators") if row.p50 is not None}
    assert "fp32 1 TFLOP/s, memory 100 GB/s" in words(figure)
    copies = replace(rows[0], operator="add_norm", flops=0)
    assert "not drawn: add_norm" in words(plots.roofline([rows[0], copies], environment))


def test_the_roof_rises_to_its_peak_left_of_all_points(rows: list[Row], environment: dict) -> None:
    figure = plots.roofline(of(rows, "operators"), {**environment, "peaks": {"fp32": 1e11, "bandwidth": 1e11}})
    (roof,) = [line for line in figure.findobj(Axes)[0].lines if line.get_marker() == "None"]
    x, y = list(roof.get_xdata()), list(roof.get_ydata())
    assert x == sorted(x)
    assert y[0] == pytest.approx(x[0] * 1e11)
    assert y[1:] == [1e11, 1e11]


def test_growth_shows_points_and_exponent(rows: list[Row], environment: dict) -> None:
    figure = plots.scaling(of(rows, "growth"), [FIT], environment)
    axes = axes_named(figure, "text_side")
    (curve,) = axes.lines
    assert list(curve.get_xdata()) == [2, 4, 8]
    assert list(curve.get_ydata()) == pytest.approx([0.000004, 0.000016, 0.000064])
    assert curve.get_label() == "eager C^2.00 (2–8)"
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_every_figure_says_where_its_numbers_come_from(rows: list[Row], environment: dict) -> None:
    made = [
        plots.latency(of(rows, "operators"), "both", environment),
        plots.speed_ups(of(rows, "operators"), "reference", environment),
        plots.memory(of(rows, "operators"), environment),
        plots.roofline(of(rows, "operators"), environment),
        plots.scaling(of(rows, "growth"), [], environment),
    ]
    for figure in made:
        assert "Abacus 3, 2 threads; python 3.11.7; torch 2.11.0; commit 0123456789ab" in words(figure)


def test_providers_keep_their_colours() -> None:
    assert not same_color(plots.COLOURS["eager"], plots.COLOURS["triton"])
    assert len(set(plots.COLOURS.values())) == len(plots.COLOURS)


def test_files(rows: list[Row], write_results: WriteResults, tmp_path: Path) -> None:
    """Every figure as PNG and SVG; drawn again, the same bytes; nothing else is left behind."""
    results = write_results("again", [row for row in rows if row.suite == "steps"])
    assert plots.main([str(results)]) == 0
    first = {path.name: path.read_bytes() for path in (results / "plots").iterdir()}
    names = {"steps-latency-both", "steps-memory", "steps-roofline"}
    assert set(first) == {f"{name}{ending}" for name in names for ending in (".png", ".svg")}
    assert plots.main([str(results), "--output", str(tmp_path / "other")]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()} == first


def test_nothing_measured_is_no_crash(rows: list[Row], write_results: WriteResults) -> None:
    """A job that broke has one row without provider."""
    broken = Row(job="operators/spcl/C2", suite="operators", operator="spcl", provider="-", status="FAILED", detail="x")
    results = write_results("broken", [broken])
    assert plots.main([str(results)]) == 0
    assert (results / "plots" / "operators-latency-both.svg").is_file()


def test_mistakes_end_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plots.main([str(tmp_path)]) == 2
    assert "rows.json" in capsys.readouterr().err

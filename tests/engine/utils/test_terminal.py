"""Tables on standard output."""

from __future__ import annotations

import pytest

from pspg.engine.utils.terminal import show_table


def test_a_table_is_capped_aligned_and_shows_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["[bold]a[/bold]", "0.5"], ["b" * 100, "12.25"], ["c", "–"], ["d", "1"]]
    show_table(["name", "value"], rows, title="all", most=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "all"
    assert lines[1].split() == ["name", "value"]
    assert [line.split() for line in lines[2:5]] == rows[:3]
    assert {len(line.rstrip()) for line in lines[1:5]} == {len(lines[1].rstrip())}  # aligned to the right
    assert lines[5] == "… and 1 more"
    assert len(lines) == 6


def test_titles_columns_and_cells_move_no_cursor_and_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    nasty = "\x1b[31m[red]\u202ex\n"
    show_table([nasty, "a"], [[nasty, nasty]], title=nasty)
    shown = capsys.readouterr().out
    assert shown.count(r"\x1b[31m[red]\u202ex\x0a") == 4
    assert "\x1b" not in shown
    assert "\u202e" not in shown

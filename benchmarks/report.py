"""`python -m benchmarks.report RESULTS_FOLDER`: the measured rows as Markdown, printed or put into a README.

In the README the text goes between the lines `<!-- results: NAME -->` and `<!-- end -->`, where NAME is the name of the
folder; what stood there is replaced.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pspg.engine.utils.errors import UserError
from pspg.engine.utils.files import write_text

from .plots import fits_of
from .present import (
    BASELINE,
    DIRECTIONS,
    Fit,
    by_case,
    measured,
    number,
    origin,
    peaks,
    providers_of,
    remarks,
    size,
    speed_up,
    times,
    title_of,
    with_range,
    without_numbers,
)
from .rows import Row, read_environment, read_rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables or rewrite a README; returns the exit status, 2 after a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, help="folder that benchmarks.suite wrote")
    parser.add_argument("--readme", type=Path, help="rewrite this file between the folder's markers")
    options = parser.parse_args(arguments)
    try:
        if options.readme is None:
            print(markdown(options.results, Path()))
        else:
            rewrite(options.readme, options.results)
    except UserError as error:
        print(f"benchmarks.report: error: {error}", file=sys.stderr)
        return 2
    return 0


def rewrite(readme: Path, results: Path) -> None:
    """Replace what stands between the markers of a results folder.

    Raises:
        UserError: no such file, no such markers or several, or no results.
    """
    try:
        text = readme.read_text()
    except OSError:
        raise UserError(f"{readme}: cannot be read; give a Markdown file with markers of results") from None
    begin, end = f"<!-- results: {results.resolve().name} -->", "<!-- end -->"
    parts = re.split(f"(?s)({re.escape(begin)}\n).*?({re.escape(end)})", text)
    if len(parts) != 4 or begin in parts[0] + parts[3]:
        raise UserError(f"{readme}: needs the line {begin} once, and below it the line {end}")
    before, opening, closing, after = parts
    write_text(readme, f"{before}{opening}\n{markdown(results, readme.parent)}\n\n{closing}{after}")


def markdown(results: Path, place: Path) -> str:
    """Tables and figures of a results folder, for a file in folder `place`.

    Raises:
        UserError: no results.
    """
    rows, environment = read_rows(results), read_environment(results)
    parts = [_origin(environment, results)]
    for suite in dict.fromkeys(row.suite for row in rows if row.suite != "growth"):
        parts += [f"### {suite.capitalize()}", *_tables([row for row in rows if row.suite == suite])]
    fits = fits_of(rows)
    if fits:
        parts += ["### Growth", _growth(fits)]
    missing = without_numbers(rows)
    if missing:
        parts += ["### Without numbers", "\n".join(f"- {_escape(line)}" for line in missing)]
    notes = remarks(rows)
    if notes:
        parts.append(_folded("Remarks", "\n".join(f"- {_escape(line)}" for line in notes)))
    figures = sorted((results / "plots").glob("*.png"))
    if figures:
        parts += ["### Figures", "\n\n".join(_image(figure, place) for figure in figures)]
    return "\n\n".join(parts)


def _origin(environment: Mapping[str, Any], results: Path) -> str:
    return "\n".join(
        [
            f"- on: {_escape(origin(environment))}",
            f"- measured peaks: {peaks(environment)}",
            f"- to measure again: `python -m benchmarks.suite --device {environment['device']} --output {results}`",
        ]
    )


def _tables(rows: Sequence[Row]) -> list[str]:
    """A table forward and backward, and, folded, one a direction."""
    return [
        _table(rows, direction) if direction == "both" else _folded(f"{direction} alone", _table(rows, direction))
        for direction in DIRECTIONS
        if by_case(rows, direction)
    ]


def _table(rows: Sequence[Row], direction: str) -> str:
    """A line a case and a column a provider: median time (p20 to p80); then how the fastest compares."""
    cases = by_case(rows, direction)
    providers = providers_of(row for found in cases.values() for row in found.values())
    head = ["", "case", *providers, "fastest", f"against {BASELINE}", "of roofline", "peak memory"]
    lines = []
    for case, found in cases.items():
        cells = [_cell(found.get(name)) for name in providers]
        name = title_of(next(iter(found.values()))) if direction == "both" else case.operator
        lines.append([name, case.shape, *cells, *_fastest(found)])
    return _grid(head, lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if not measured(row):
        return row.status
    return with_range(*times(row))


def _fastest(found: Mapping[str, Row]) -> list[str]:
    """Name of the fastest provider, its speed-up, its share of the roofline, its memory beside the baseline's."""
    ran = {name: row for name, row in found.items() if measured(row)}
    if not ran:
        return ["", "", "", ""]
    name = min(ran, key=lambda one: times(ran[one])[1])
    row, factor = ran[name], speed_up(ran, name)
    share = "" if row.roofline is None else f"{number(100 * row.roofline)} %"
    memory = "" if row.peak_bytes is None else size(row.peak_bytes)
    baseline = ran.get(BASELINE)
    if memory and name != BASELINE and baseline is not None and baseline.peak_bytes is not None:
        memory += f" ({BASELINE} {size(baseline.peak_bytes)})"
    return [name, "" if factor is None else f"{number(factor)}×", share, memory]


def _growth(fits: Iterable[Fit]) -> str:
    lines = [
        [operator, provider, f"{variable}^{exponent:.2f}", f"{variable} = {low:g} … {high:g}"]
        for operator, provider, variable, exponent, (low, high) in fits
    ]
    return _grid(["", "provider", "time grows as", "over"], lines)


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _grid(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    table = [head, ["---"] * len(head), *([_escape(cell) for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def _image(path: Path, place: Path) -> str:
    return f"![{path.stem}]({quote(Path(os.path.relpath(path, place)).as_posix())})"


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, in a cell of a table too."""
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", text)


if __name__ == "__main__":
    sys.exit(main())

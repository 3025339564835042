"""`python -m benchmarks.report RESULTS`: pictures beside a results file, and its tables as Markdown.

The tables are printed, or put into a README between the lines `<!-- results: NAME -->` and `<!-- end -->`, where NAME
is the name of the folder; what stood there is replaced.
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

from .command import command
from .plots import draw
from .rows import Row, read_results
from .tables import BASELINE, fits, memory, number, origin, share, speed_up, times


@command("benchmarks.report")
def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, and print the tables or rewrite a README; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, help="folder that benchmarks.run wrote")
    parser.add_argument("--readme", type=Path, help="rewrite this file between the folder's markers")
    options = parser.parse_args(arguments)
    content = read_results(options.results / "results.json")
    pictures = draw(content, options.results)
    if options.readme is None:
        print(markdown(content, pictures, Path()))
    else:
        rewrite(options.readme, options.results.resolve().name, markdown(content, pictures, options.readme.parent))
    return 0


def rewrite(readme: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of a results folder.

    Raises:
        UserError: no such file, no such markers or several.
    """
    try:
        before = readme.read_text()
    except OSError:
        raise UserError(f"{readme}: cannot be read; give a Markdown file with markers of results") from None
    begin, end = f"<!-- results: {name} -->", "<!-- end -->"
    parts = re.split(f"(?s)({re.escape(begin)}\n).*?({re.escape(end)})", before)
    if len(parts) != 4 or begin in parts[0] + parts[3]:
        raise UserError(f"{readme}: needs the line {begin} once, and below it the line {end}")
    write_text(readme, f"{parts[0]}{parts[1]}\n{text}\n\n{parts[2]}{parts[3]}")


def markdown(content: Mapping[str, Any], pictures: Iterable[Path], place: Path) -> str:
    """Tables and pictures for a file in folder `place`."""
    rows: list[Row] = [row for row in content["rows"] if row.direction == "both"]
    peaks = ", ".join(f"{name} {number(rate / 1e9)}" for name, rate in content["environment"]["peaks"].items())
    parts = [f"- on: {_escape(origin(content['environment']))}\n- measured peaks, GFLOP/s and GB/s: {peaks}"]
    for group in dict.fromkeys(row.group for row in rows if row.group != "growth"):
        parts.append(f"### {group.capitalize()}\n\n{_table([row for row in rows if row.group == group])}")
    if found := fits(rows):
        parts.append("### Growth\n\n" + "\n".join(f"- {fit}" for fit in found))
    parts += [f"![{path.stem}]({quote(Path(os.path.relpath(path, place)).as_posix())})" for path in pictures]
    return "\n\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    """A line a case and a column an implementation: medians; then how the fastest one compares."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.operator, row.shape), {})[row.impl] = row
    impls, names = list(dict.fromkeys(row.impl for row in rows)), [row.operator for row in rows]
    lines: list[Sequence[str]] = [["", "", *impls, "fastest", f"× {BASELINE}", "roofline", "memory"]]
    lines.append(["---"] * len(lines[0]))
    for case, found in sorted(cases.items(), key=lambda item: names.index(item[0][0])):
        ran = [row for row in found.values() if row.measured]
        cells = ["" if impl not in found else times(found[impl]) for impl in impls]
        if ran:
            best = min(ran, key=lambda row: row.p50 or 0)
            cells += [best.impl, speed_up(best, found.get(BASELINE)), share(best), memory(best)]
        lines.append([*case, *cells])
    return "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, in a cell of a table too."""
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", text)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.report RESULTS`: pictures beside a results file, and its tables as Markdown.

The tables are printed, or put into a README between the lines `<!-- results: NAME -->` and `<!-- end -->`, where NAME is
the name of the folder; what stood there is replaced.
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

from pspg.engine.errors import UserError
from pspg.engine.files import write_text

from .growth import fits
from .plots import draw
from .rows import Row, read_results
from .tables import HEAD, lines_of, number, origin, reasons


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, and print the tables or rewrite a README; returns the exit status, 2 after a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, help="folder that benchmarks.run wrote")
    parser.add_argument("--readme", type=Path, help="rewrite this file between the folder's markers")
    options = parser.parse_args(arguments)
    try:
        content = read_results(options.results)
        if not options.results.is_dir() or not content["rows"]:
            raise UserError(f"{options.results}: is not a folder with measured rows")
        pictures = draw(content, options.results)
        if options.readme is None:
            print(markdown(content, pictures, Path()))
        else:
            rewrite(options.readme, options.results.resolve().name, markdown(content, pictures, options.readme.parent))
    except UserError as error:
        print(f"benchmarks.report: error: {error}", file=sys.stderr)
        return 2
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
    """Tables and pictures for a file in folder `place`: forward and backward, then, folded, each direction alone."""
    rows: list[Row] = content["rows"]
    peaks = ", ".join(f"{name} {number(rate / 1e9)}" for name, rate in content["environment"]["peaks"].items())
    parts = [f"- on: {_escape(origin(content['environment']))}\n- measured peaks, GFLOP/s and GB/s: {peaks}"]
    for group in dict.fromkeys(row.group for row in rows if row.group != "growth"):
        mine = [row for row in rows if row.group == group]
        parts += [f"### {group.capitalize()}", _table([row for row in mine if row.direction == "both"])]
        parts += [
            _folded(f"{direction} alone", _table([row for row in mine if row.direction == direction]))
            for direction in ("forward", "backward")
            if any(row.direction == direction for row in mine)
        ]
    if found := fits(rows):
        parts += ["### Growth", "\n".join(f"- {fit.text}" for fit in found)]
    notes = "\n".join(f"- {_escape(line)}" for line in reasons(row for row in rows if row.direction == "both"))
    parts += [_folded("Remarks", notes)] if notes else []
    parts += [f"![{path.stem}]({quote(Path(os.path.relpath(path, place)).as_posix())})" for path in pictures]
    return "\n\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    table = [HEAD, ["---"] * len(HEAD), *lines_of([row for row in rows if row.measured])]
    return "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in table)


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, in a cell of a table too."""
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", text)


if __name__ == "__main__":
    sys.exit(main())

"""Tables on standard output: drawn where a person looks, plain columns in a file or a pipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .text import printable

PLAIN_WIDTH = 200
"""characters of a line that no terminal limits"""


def show_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", most: int | None = None
) -> None:
    """Print a table; columns but the first are aligned to the right where all their cells are numbers.

    Args:
        most: rows to print; how many are left out is said below. None: all.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    heading = Text(printable(title)) if title else None
    table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD if console.is_terminal else None)
    shown = list(rows)[:most]
    for number, column in enumerate(columns):
        figures = number > 0 and all(row[number][:1].isdigit() or row[number] in ("", "–") for row in shown)
        table.add_column(Text(printable(column)), justify="right" if figures else "left", no_wrap=number > 0)
    for row in shown:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)
    if len(shown) < len(rows):
        console.print(f"… and {len(rows) - len(shown)} more")

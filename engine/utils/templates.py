"""Pages and Markdown from templates in which every value is escaped."""

from __future__ import annotations

import html
import math
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .text import printable


def html_templates(folder: Path) -> Environment:
    """Templates of a folder; a value is one printable line, escaped as HTML."""
    return _environment(folder, autoescape=True, finalize=_html)


def markdown_templates(folder: Path) -> Environment:
    """Templates of a folder; a value is one line of text, neither markup, HTML nor the end of a table cell."""
    return _environment(folder, finalize=_markdown)


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _environment(folder: Path, **settings: Any) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **settings,
    )
    environment.filters["number"] = number
    return environment


def _html(value: object) -> object:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _markdown(value: object) -> str:
    line = html.escape(printable(" ".join(str(value).split())), quote=False)
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", line)

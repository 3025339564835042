"""Text from files, as it may be shown: it moves no cursor, hides nothing and ends no line."""

from __future__ import annotations

import unicodedata

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that are not shown: controls (C0, C1, DEL), formats (bidi and zero-width), surrogates, private and
unassigned characters, separators of lines and paragraphs"""
JOINERS = "\u200c\u200d"
"""format characters that words of living languages hold: ZWNJ, ZWJ"""


def printable(text: object) -> str:
    """One line in which every character that is not shown is an escape, such as \\x1b or \\u202e.

    The one function at each border: terminal, CSV, Markdown and HTML.
    """
    line = str(text)
    if line.isascii() and line.isprintable():
        return line
    return "".join(_escaped(c) if unicodedata.category(c) in HIDDEN and c not in JOINERS else c for c in line)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

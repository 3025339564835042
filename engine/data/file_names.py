"""Names of image files as people write and copy them."""

from __future__ import annotations

import posixpath
import unicodedata
from pathlib import PurePath


def plain_path(text: str) -> str:
    """A relative path with slashes, without `.` and doubled slashes: `.\\s//a.png` is `s/a.png`."""
    return posixpath.normpath(text.replace("\\", "/")) if text else text


def spellings(path: str) -> list[str]:
    """The path as it is written, then with its accents as one character each, then as two: file systems differ."""
    return list(dict.fromkeys([path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)]))


def is_shadow(path: PurePath) -> bool:
    """True for what macOS leaves beside the files that it copies or packs: `._a.png`, `__MACOSX/`."""
    return path.name.startswith("._") or "__MACOSX" in path.parts

"""Image files that cannot be used."""

from __future__ import annotations

import logging
from pathlib import Path

from ..utils.errors import UserError

log = logging.getLogger(__name__)

MAX_MEGAPIXELS = 100.0
"""Largest image, million pixels; the largest chest radiographs have about 20."""


class BadImage(UserError):
    """An image file that cannot be used; the message names the file and the reason."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[Path, str]]:
        return type(self), (self.path, self.reason)


def check_extent(path: Path, width: int, height: int, max_megapixels: float) -> None:
    """Refuse, before it is decoded, an image that would need too much memory.

    Raises:
        BadImage: more than `max_megapixels` million pixels.
    """
    if width * height > max_megapixels * 1e6:
        size, limit = f"{width} × {height} pixels", f"max_megapixels {max_megapixels:g}"
        raise BadImage(path, f"{size}, more than {limit} million; raise the limit or shrink the image")


def report_bad(bad: dict[str, str]) -> None:
    """Count and list the images that were left out."""
    if bad:
        log.warning(f"{len(bad)} unreadable images were left out:")
        for reason in list(bad.values())[:20]:
            log.warning(f"  {reason}")
        if len(bad) > 20:
            log.warning(f"  … and {len(bad) - 20} more; pspg-engine prepare check --output bad.csv lists all")

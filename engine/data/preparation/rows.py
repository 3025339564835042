"""Rows of a manifest, and a journal of what was left out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Labels = list[int | None]


@dataclass(slots=True)
class Row:
    """One image. Its file is `filepath` in the first of `folders` (relative to the image root) that holds it."""

    id: str
    filepath: str
    split: str
    place: str
    """where the row comes from: file and line"""
    labels: Labels | None = None
    """1, 0, -1 or None a class"""
    patient: str | None = None
    text: str | None = None
    folders: Sequence[str] = ("",)

    @property
    def candidates(self) -> list[str]:
        """Paths where the file may be, the usual place first."""
        return [f"{folder}/{self.filepath}" if folder else self.filepath for folder in self.folders]


@dataclass
class Journal:
    """Notes on what was left out and why, and on what a person should know."""

    dropped: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """reason → (place, image or class)"""
    warnings: list[str] = field(default_factory=list)

    def drop(self, reason: str, place: str, what: str) -> None:
        """Note one row or class that is left out."""
        self.dropped.setdefault(reason, []).append((place, what))

    def warn(self, message: str) -> None:
        """Note something that a person should know."""
        self.warnings.append(message)

    def summary(self, examples: int = 5) -> dict[str, dict[str, object]]:
        """Count and first examples of every reason."""
        return {
            reason: {"count": len(entries), "first": [f"{place} {what}".strip() for place, what in entries[:examples]]}
            for reason, entries in self.dropped.items()
        }

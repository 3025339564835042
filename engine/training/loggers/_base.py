"""The contract of loggers, and what they are told of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ...utils.files import write_text

Setting = str | int | float | bool


@dataclass(frozen=True)
class RunStart:
    """A run at its start, or where it is resumed."""

    folder: Path
    """run folder"""
    step: int
    """optimizer step that it continues after; 0: a fresh run"""
    settings: Mapping[str, Setting]
    """dotted key → value; files and folders by their name alone"""
    metrics: tuple[str, ...]
    """metrics that sum a run up"""


class Logger(ABC):
    """Receives the metrics of one run, on the first rank only.

    An error at the start ends the run before it trains. Later, an error of a `remote` logger is told once and it gets
    nothing from there on; of another it ends the run.
    """

    name: ClassVar[str]
    """value of `logger`"""
    package: ClassVar[str]
    """what it imports, at its start; the extra of the same name installs it"""
    remote: ClassVar[bool] = False
    """whether it may send what it receives to another machine"""

    @abstractmethod
    def __init__(self, start: RunStart) -> None: ...

    @abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Finite metrics after optimizer step `step`."""

    @abstractmethod
    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """A picture (h,w,3)."""

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """Write what is left; `failed`: the run ended by an error or an interrupt."""


def remembered(start: RunStart, name: str) -> str | None:
    """What `remember` noted earlier in the run's folder, if the run is resumed."""
    path = start.folder / f"{name}.id"
    return path.read_text(encoding="utf-8").strip() if start.step and path.is_file() else None


def remember(start: RunStart, name: str, identity: str) -> None:
    """Note a service's name for the run in its folder, so that a resumed run goes on under it."""
    write_text(start.folder / f"{name}.id", identity + "\n")

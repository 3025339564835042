"""Messages of the engine: loggers below `pspg`, shown by the command line, silent in a program that wants none."""

from __future__ import annotations

import logging
import os
import sys
from typing import Self

from tqdm import tqdm

from .text import printable

ROOT = "pspg"
OF_EACH = {"of_each": True}
"""`extra` of a message that each of several processes has to tell"""


def is_first() -> bool:
    """Whether this is the first of several processes, or the only one, as its launcher says."""
    return os.environ.get("RANK", "0") == "0"


class AboveProgressBars(logging.Handler):
    """Writes each message as one printable line on standard error, without breaking a progress bar.

    Of several processes the first tells what all of them meet; the others show errors only, which are their own, and
    messages with `extra=OF_EACH`.
    """

    def emit(self, record: logging.LogRecord) -> None:
        own = record.levelno >= logging.ERROR or getattr(record, "of_each", False)
        if not own and not is_first():
            return
        tqdm.write(printable(self.format(record)), file=sys.stderr)


class Heard(logging.Handler):
    """Context that remembers whether a logger and those below it have warned.

    Args:
        name: of the logger.
    """

    def __init__(self, name: str) -> None:
        super().__init__(logging.WARNING)
        self._logger, self.warned = logging.getLogger(name), False

    def emit(self, record: logging.LogRecord) -> None:
        self.warned = True

    def __enter__(self) -> Self:
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)


def show_messages() -> None:
    """Show messages of level INFO and above on standard error, once; what a program has set up stays."""
    logger = logging.getLogger(ROOT)
    if not any(isinstance(handler, AboveProgressBars) for handler in logger.handlers):
        logger.addHandler(AboveProgressBars())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)

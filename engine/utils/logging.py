"""Messages of the engine: loggers below `pspg`, shown by the command line, silent in a program that wants none."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

from .text import printable

ROOT = "pspg"


class AboveProgressBars(logging.Handler):
    """Writes each message as one printable line on standard error, without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(self.format(record)), file=sys.stderr)


def show_messages() -> None:
    """Show messages of level INFO and above on standard error, once; what a program has set up stays."""
    logger = logging.getLogger(ROOT)
    if not any(isinstance(handler, AboveProgressBars) for handler in logger.handlers):
        logger.addHandler(AboveProgressBars())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)

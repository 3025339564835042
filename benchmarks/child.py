"""A fresh process that answers messages."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any


class Child:
    """A process and a pipe to it.

    Args:
        work: called there with its end of the pipe and the arguments.
    """

    def __init__(self, work: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, message: object) -> Any:
        """Send a message and wait for the answer.

        Raises:
            EOFError: the process has ended.
        """
        try:
            self.pipe.send(message)
            return self.pipe.recv()
        except (BrokenPipeError, ConnectionResetError):
            raise EOFError from None

    def close(self, patience: float = 5) -> str:
        """End the process, by force after some seconds; how it ended, in a few words."""
        self.pipe.close()
        self._process.join(patience)
        self._process.kill()
        self._process.join()
        return f"its process ended with status {self._process.exitcode}"

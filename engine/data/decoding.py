"""Decoding many files in several processes; a file that crashes its decoder costs only itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

from ..utils.errors import UserError
from ..utils.workers import die_with_parent
from .bad_image import BadImage

T = TypeVar("T")


class DecoderPool(Generic[T]):
    """Processes that call `function` on paths; use it in a `with` statement.

    Args:
        function: path → result; picklable; raises BadImage.
        workers: processes, at least 1.
    """

    def __init__(self, function: Callable[[Path], T], workers: int) -> None:
        self._attempt = _Attempt(function)
        self._workers = workers
        self._others = set(multiprocessing.active_children())
        self._executor = _executor(workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._executor.shutdown(cancel_futures=True)
        finally:
            # Where the pool's own thread could not be started nobody tells its processes to end, and the exit waits.
            for process in set(multiprocessing.active_children()) - self._others:
                process.kill()
                process.join()

    def map(self, paths: Sequence[Path]) -> Iterator[T | BadImage]:
        """Results in the order of `paths`, BadImage as a value; give a few thousand paths at a time.

        Raises:
            UserError: what `function` raises besides BadImage; no memory or threads for the processes.
        """
        done = 0
        try:
            for result in self._executor.map(self._attempt, paths, chunksize=8):
                done += 1
                yield result
        except BrokenProcessPool:
            # A process died over one of the others: each gets a process of its own.
            for path in paths[done:]:
                yield self._alone(path)
            self._executor = _executor(self._workers)

    def _alone(self, path: Path) -> T | BadImage:
        with _executor(1) as executor:
            try:
                return executor.submit(self._attempt, path).result()
            except BrokenProcessPool:
                return BadImage(path, "its decoder crashes, or needs more memory than there is")


class _Attempt(Generic[T]):
    """The function with BadImage returned."""

    def __init__(self, function: Callable[[Path], T]) -> None:
        self.function = function

    def __call__(self, path: Path) -> T | BadImage:
        if _unwatched:
            raise UserError(f"workers: {_unwatched[0]} in a decoding process, memory is lacking; lower workers")
        try:
            return self.function(path)
        except BadImage as error:
            return error
        except MemoryError:
            return BadImage(path, "needs more memory than there is")


def _executor(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker)


_unwatched: list[str] = []
"""in a child process: why it could not be started as it should"""


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # A child that ends for want of memory would print where it was; the parent says what it means.
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        die_with_parent()
    except (RuntimeError, MemoryError) as error:
        _unwatched.append(str(error) or "out of memory")

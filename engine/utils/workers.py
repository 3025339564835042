"""Child processes: they do not outlive this one, and their deaths are told in one line.

The standard library and torch cover neither: workers of a process pool wait for ever once their parent is killed, and
torch's loader watches the fork server, which lives as long as its children.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from .errors import UserError

log = logging.getLogger(__name__)

LOOK = 3
"""seconds between two looks at a loader that is waited for"""
STANDS_STILL = "a batch has not come for {:g} s: reading its images stands still, as a lost network drive does"


def die_with_parent() -> None:
    """End this child process when the one that asked for it ends, however that happens; call it in the child.

    The parent is the process that made the pool or loader, not the fork server that a child may come from.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Watchman:
    """Context that looks after loader processes while a batch of theirs is waited for.

    A process that is stopped (SIGSTOP, a debugger) at three looks, or a batch that takes too long, ends them all; torch
    then raises, and the context names the reason.

    Args:
        pids: the processes, the one whose batch is waited for first.
        timeout: seconds that a batch may take.

    Raises:
        UserError: in place of torch's error.
    """

    def __init__(self, pids: Callable[[], Sequence[int]], timeout: float) -> None:
        self._pids, self._timeout = pids, timeout
        self._since: float | None = None
        self._stopped: dict[int, int] = {}
        self._reason = ""
        self._done = threading.Event()

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Around the wait for one batch."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="watchman", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._done.set()
        if self._reason and isinstance(error, RuntimeError):
            raise _local(self._reason) from error

    def _watch(self) -> None:
        while not self._done.wait(LOOK):
            pids, since = self._pids(), self._since
            self._stopped = {pid: self._stopped.get(pid, 0) + 1 for pid in pids if since and _is_stopped(pid)}
            stopped = next((pid for pid, looks in self._stopped.items() if looks == 3), None)
            if stopped is not None:
                self._reason = f"loader process {stopped} stands still: it has been stopped; start the run again"
            elif since and time.monotonic() - since > self._timeout:
                self._reason = f"loader process {pids[0] if pids else '?'}: {STANDS_STILL.format(self._timeout)}"
            if self._reason:
                _kill(pids)
                if not self._done.wait(4 * LOOK):  # not even that ends a process that waits for a lost drive
                    log.error("pspg-engine: error: %s", self._reason)
                    os._exit(2)
                return


def _kill(pids: Sequence[int]) -> None:
    """End this process's own loaders: one that is stopped takes no SIGTERM, and the exit would wait for it."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _is_stopped(pid: int) -> bool:
    try:
        # The name, in parentheses, may hold anything; the state follows it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False


@contextmanager
def ends_after(seconds: float, reason: str) -> Iterator[None]:
    """End the process with a line where its main thread is held longer than so many seconds."""

    def end() -> None:
        log.error("pspg-engine: error: %s", reason)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _local(message: str) -> UserError:
    error = UserError(message)
    error.local = True
    return error


@contextmanager
def loader_deaths() -> Iterator[None]:
    """Name the reason where a process of torch's DataLoader is killed.

    Torch raises its error from a signal handler: wherever the main thread is, not where a batch is asked for.

    Raises:
        UserError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise _local(
            "a loader process was killed, for want of memory (lower data.workers or batch_size) or by a decoder that"
            " a corrupt file crashed"
        ) from error

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

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


class Patience:
    """Wait for one batch of loader processes.

    Args:
        timeout: seconds that it may take.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout, self._since = timeout, time.monotonic()
        self._stopped: dict[int, int] = {}

    def check(self, pids: Sequence[int]) -> None:
        """Look at the processes; call it every `LOOK` seconds, the one whose batch is waited for first.

        Raises:
            UserError: one has been stopped (SIGSTOP, a debugger) at three looks, or the time is over.
        """
        for pid in pids:
            self._stopped[pid] = self._stopped.get(pid, 0) + 1 if _is_stopped(pid) else 0
            if self._stopped[pid] == 3:
                _kill(pids)
                raise _local(f"loader process {pid} stands still: it has been stopped; start the run again")
        if time.monotonic() - self._since > self._timeout:
            _kill(pids)
            raise _local(f"loader process {pids[0] if pids else '?'}: {STANDS_STILL.format(self._timeout)}")


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

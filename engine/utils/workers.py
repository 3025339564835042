"""Child processes: they do not outlive this one, and their deaths are told in one line.

The standard library and torch cover neither: workers of a process pool wait for ever once their parent is killed, and
torch's loader watches the fork server, which lives as long as its children.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import UserError


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
        told = UserError(
            "a loader process was killed, for want of memory (lower data.workers or batch_size) or by a decoder that"
            " a corrupt file crashed"
        )
        told.local = True
        raise told from error

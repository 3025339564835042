"""Ctrl-C that is not lost.

Python raises KeyboardInterrupt wherever the main thread is. In a callback of a weak reference (importing a module runs
one), in a destructor, or below an `except:` of a library it is swallowed, and the command goes on as if nothing had
been said: of 15 s that a training takes to start, most are such imports.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

PAUSE = 0.1
"""seconds from where an interrupt was swallowed to the next one"""


class Interrupt(KeyboardInterrupt):
    """A KeyboardInterrupt that says when it is gone: nothing holds one that was swallowed."""

    def __init__(self, gone: SimpleQueue[None]) -> None:
        super().__init__()
        self._gone = gone

    def __del__(self) -> None:
        self._gone.put(None)  # of all queues this one may be filled in a destructor


class Interrupts:
    """What `heard_interrupts` yields."""

    heard = False
    """SIGINT has come: whatever is raised from now on is a consequence"""


@contextmanager
def heard_interrupts() -> Iterator[Interrupts]:
    """Within it, SIGINT raises KeyboardInterrupt, and again a moment later for as long as somebody swallows it.

    One that is on its way up is left to it, however long that takes. Where SIGINT is ignored or handled by somebody
    else, and in other threads than the main one, nothing is changed.
    """
    found, gone, owner = Interrupts(), SimpleQueue[None](), os.getpid()
    done, main = threading.Event(), threading.main_thread()
    if threading.current_thread() is not main or (signal.getsignal(signal.SIGINT) is not signal.default_int_handler):
        yield found
        return

    def again() -> None:
        while True:
            gone.get()
            time.sleep(PAUSE)
            if done.is_set():
                return
            signal.pthread_kill(main.ident or 0, signal.SIGINT)  # it also ends a wait of that thread

    def interrupt(*_: object) -> None:
        if os.getpid() != owner:  # a forked child, which has no such thread
            raise KeyboardInterrupt
        if not found.heard:
            found.heard = True
            threading.Thread(target=again, name="interrupt", daemon=True).start()
        raise Interrupt(gone)

    def unraisable(problem: Any) -> None:
        if not issubclass(problem.exc_type, Interrupt):
            hook(problem)

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield found
    finally:
        done.set()
        gone.put(None)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = hook

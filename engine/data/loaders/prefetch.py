"""Working ahead in a background thread."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Generator[T], depth: int) -> Iterator[T]:
    """The same items, made by a thread that is at most `depth` of them ahead; its exception is raised in its place.

    The thread and `items` end with the iteration, also with one that is left early.
    """
    ready: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
    room, stopped = threading.Semaphore(depth), threading.Event()

    def work() -> None:
        try:
            while True:
                room.acquire()
                if stopped.is_set():
                    return
                ready.put((next(items), None))
        except BaseException as error:  # StopIteration included
            ready.put((None, error))
        finally:
            items.close()

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        room.release()
        thread.join()

"""One writer a folder: a lock file that names its holder, and that a dead process does not hold.

The lock is a POSIX record lock on `<folder>/.lock`, which the system gives up when the process ends however it ends,
and which NFS servers keep for all their clients. Where NFS is mounted without locks it holds within one machine;
against others the file's age speaks: a holder touches it every 15 s.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError
from .files import naming
from .text import printable

LOCK = ".lock"
BEAT = 15.0
"""seconds between two touches of a lock file"""
STALE = 4 * BEAT
"""seconds after which the lock of another machine is taken over; more than NFS caches a file's age"""

_held: set[str] = set()
"""folders that this process holds: a record lock does not keep a process from itself"""


@contextmanager
def one_writer(folder: str | Path, *, key: str = "output") -> Iterator[None]:
    """Hold a folder, made if it is not there, against other writers; `key` is the setting that names it.

    Raises:
        UserError: another process holds it; names the host and the process.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path, own = folder / LOCK, os.path.realpath(folder)
    if own in _held:
        raise UserError(f"{key}: {folder} is in use by this process already; choose another folder")
    descriptor = _acquire(path, f"{key}: {folder}")
    _held.add(own)
    done = threading.Event()
    beats = threading.Thread(target=_beat, args=(descriptor, done), name="lock", daemon=True)
    try:
        with naming(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode(), 0)
        beats.start()
        yield
    finally:
        done.set()
        if beats.is_alive():
            beats.join()
        _held.discard(own)
        with suppress(OSError):
            path.unlink()  # before it is let go: whoever waits for it makes another
        os.close(descriptor)
        with suppress(OSError):
            for place in made:  # nothing was written
                place.rmdir()


def _acquire(path: Path, where: str) -> int:
    """Descriptor of the locked file."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        locked = _try_lock(descriptor)
        host, process = _holder(descriptor)
        fresh = time.time() - os.fstat(descriptor).st_mtime < STALE
        if not locked or (host not in ("", socket.gethostname()) and fresh):
            os.close(descriptor)
            holder = f"host {printable(host)}, process {process}" if host else "it has just started"
            raise UserError(f"{where} is in use by another process ({holder}); wait for it or choose another folder")
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)  # its last holder has just removed it


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)  # else the file system has no locks
    return True


def _holder(descriptor: int) -> tuple[str, int]:
    """Host and process that wrote the file last; empty: nobody."""
    try:
        content = json.loads(os.pread(descriptor, 1000, 0))
        return str(content["host"])[:100], int(content["process"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return "", 0


def _beat(descriptor: int, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with suppress(OSError):
            os.utime(descriptor)

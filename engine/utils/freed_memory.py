"""Where the memory of freed tensors goes on a CPU."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""glibc's numbers of these limits (mallopt in malloc.h)"""
_KEEP = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1))
_GIVE_BACK = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**26))
"""what glibc itself comes to once a large block was freed"""
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[bool]:
    """Within it the process keeps the memory of freed tensors for the next ones, where it computes on a CPU with glibc.

    glibc gives blocks of over 32 MB back to the system, which fills their pages with zeros before the next tensor has
    them: a fifth of the CPU time of a phase-1 step of 32 images. Kept, the memory is the most that it was until the
    end, and that is more (by a quarter there), as free blocks do not fit every tensor.

    A limit of malloc in the environment is left as it is (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_MAX_,
    MALLOC_MMAP_THRESHOLD_, or glibc.malloc in GLIBC_TUNABLES). Where a request for memory can fail (ulimit -v, -d;
    vm.overcommit_memory 2) nothing is kept: a loader's worker that was short of memory for it stood still.

    Yields:
        Whether it is kept.
    """
    chosen = any(name in os.environ for name in _CHOSEN) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    c = None if device.type != "cpu" or chosen or _limited() else _glibc()
    if c is None:
        yield False
        return
    kept = sum(c.mallopt(*limit) for limit in _KEEP) == len(_KEEP)
    try:
        yield kept
    finally:
        for limit in _GIVE_BACK:
            c.mallopt(*limit)
        c.malloc_trim(0)


def _limited() -> bool:
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return True
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        return False


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if its malloc has these limits."""
    try:
        c = ctypes.CDLL(None)
        return c if c.mallopt and c.malloc_trim else None
    except (AttributeError, OSError, TypeError):
        return None

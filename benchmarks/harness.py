"""Times and memory of several providers of one case, in turns, so that they see the same machine."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch

from .machine import PeakMemory
from .rows import FAILED, TOO_LARGE, UNAVAILABLE, Row, without_numbers

T = TypeVar("T")

SLOW = 5.0
"""seconds above which a call is repeated three times and needs no warm-up"""
VERY_SLOW = 30.0
"""seconds above which it is repeated twice"""
SECONDS = 3.0
"""of repetitions that a faster one is given"""
FEWEST, MOST = 5, 50
"""repetitions of a faster one"""
Call = Callable[[int], Mapping[str, float]]
"""one repetition, given its number → direction → seconds; it synchronises with the device"""


@dataclass
class Measured:
    """What came of one provider."""

    times: dict[str, list[float]] = field(default_factory=dict)
    """direction → seconds"""
    peak_bytes: int = 0
    status: str | None = None
    """why it has no times; None: it has"""
    detail: str = ""

    def rows(self, row: Row, directions: tuple[str, ...]) -> list[Row]:
        """The row, once a direction, with these numbers."""
        if self.status is not None:
            return [without_numbers(replace(row, direction=one), self.status, self.detail) for one in directions]
        return [self._row(replace(row, direction=one)) for one in directions]

    def _row(self, row: Row) -> Row:
        times = self.times[row.direction]
        p20, p50, p80 = (float(value) for value in np.percentile(times, [20, 50, 80]))
        return replace(row, repeats=len(times), p20=p20, p50=p50, p80=p80, peak_bytes=self.peak_bytes)


class Unavailable(Exception):
    """A provider cannot run here, or is not worth its time; its message is one line."""

    def __init__(self, reason: str, status: str = UNAVAILABLE) -> None:
        super().__init__(reason)
        self.status = status


def take_turns(
    make: Mapping[str, Callable[[], Call]],
    device: torch.device,
    started: Callable[[str], None] = lambda name: None,
    *,
    seconds: float | None = None,
) -> dict[str, Measured]:
    """Measure providers in turns: a repetition of each, then the next of each.

    Args:
        make: provider → function that prepares it. May raise `Unavailable`.
        device: where they run.
        started: told which provider runs, before it does.
        seconds: of repetitions that a fast provider is given; None: `SECONDS`.
    """
    given = SECONDS if seconds is None else seconds
    found = {name: Measured() for name in make}
    calls: dict[str, Call] = {}
    left: dict[str, int] = {}
    warmed_up: set[str] = set()
    for name, prepare in make.items():
        started(name)
        call = _guard(found[name], prepare)
        first = None if call is None else _repeat(found[name], call, 0, device)
        if call is None or first is None:
            continue
        calls[name], left[name] = call, 1
        if max(first.values()) <= SLOW:
            warmed_up.add(name)
            if device.type == "cpu":
                found[name].peak_bytes = 0  # pages of libraries that the first call has loaded count for nobody
            continue
        _keep(found[name], first)
        left[name] = 2 if max(first.values()) <= VERY_SLOW else 1
    gc.collect()
    gc.freeze()  # what compilers have imported stays: looking through it costs 0.2 s before every repetition
    turn = 1
    while any(left.values()):
        for name, call in calls.items():
            if not left[name]:
                continue
            started(name)
            times = _repeat(found[name], call, turn, device)
            left[name] -= 1
            if times is None:
                left[name] = 0
                continue
            _keep(found[name], times)
            if turn == 1 and name in warmed_up:  # the first, dropped, took too long to tell
                left[name] = min(max(int(given / max(*times.values(), 1e-6)), FEWEST), MOST) - 1
        turn += 1
    return found


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included; on a GPU between two events, without the time to launch."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def _keep(measured: Measured, times: Mapping[str, float]) -> None:
    for direction, value in times.items():
        measured.times.setdefault(direction, []).append(value)


def _repeat(measured: Measured, call: Call, turn: int, device: torch.device) -> Mapping[str, float] | None:
    memory = PeakMemory(device)
    times = _guard(measured, lambda: call(turn))
    if times is not None:
        measured.peak_bytes = max(measured.peak_bytes, memory.bytes())
    return times


def _guard(measured: Measured, function: Callable[[], T]) -> T | None:
    """The function's result; None, and the reason in `measured`, where it cannot run, does not fit or is broken."""
    try:
        return function()
    except Unavailable as error:
        measured.status, measured.detail = error.status, str(error)
    except Exception as error:  # a broken provider must not end the others
        status, first_line = (TOO_LARGE if _is_memory(error) else FAILED), (str(error).splitlines() or [""])[0]
        measured.status, measured.detail = status, f"{type(error).__name__}: {first_line}"[:200]
        if status == FAILED:
            traceback.print_exc()
        elif torch.cuda.is_available():
            torch.cuda.empty_cache()
    return None


def _is_memory(error: Exception) -> bool:
    """Not every message that speaks of memory: a bad access and too little shared memory are mistakes of a kernel."""
    told = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in told)

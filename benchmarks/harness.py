"""Times and memory of the implementations of one case, in turns, so that they see the same machine."""

from __future__ import annotations

import gc
import math
import resource
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pspg.engine.utils.errors import first_line

from .machine import PeakMemory, memory_limit, timed
from .rows import FAILED, TOO_LARGE, UNAVAILABLE, Row

T = TypeVar("T")

SLOW, VERY_SLOW = 5.0, 30.0
"""seconds above which a call is repeated three times, and twice, and needs no warm-up"""
SECONDS = 3.0
"""seconds of repetitions that a faster call is given"""
FEWEST, MOST = 5, 50
"""repetitions of a faster one"""
Call = Callable[[int], Mapping[str, float]]
"""one repetition, given its number → direction → seconds; it synchronises with the device"""
Counts = Mapping[str, tuple[int | None, int | None]]
"""direction → FLOPs of the exact algebra, bytes that must move; None: not counted"""


class Sizes(dict[str, int]):
    """Sizes by letter, also as attributes: `sizes.C`."""

    def __getattr__(self, letter: str) -> int:
        try:
            return self[letter]
        except KeyError:
            raise AttributeError(letter) from None


class Verdict(NamedTuple):
    """Finding of the gate on one implementation."""

    error: float
    """over what is allowed"""
    detail: str = ""


class Unavailable(Exception):
    """An implementation cannot run here; its message is one line."""


def check_kernels(impl: str, device: torch.device) -> None:
    """Refuse kernels without a GPU, where Triton's interpreter would run them.

    Raises:
        Unavailable: for `triton` on a CPU.
    """
    if impl == "triton" and device.type == "cpu":
        raise Unavailable("kernels need a GPU of compute capability 8.0 or newer")


class Case(Protocol):
    """An operator, a step or a loader at one shape, dtype and device."""

    def prepare(self, impl: str) -> Call:
        """Make an implementation ready to be called; what its first repetition computes is kept for the gate.

        Raises:
            Unavailable: it cannot run here.
        """

    def verdicts(self, ran: Sequence[str]) -> Mapping[str, Verdict]:
        """Judge the implementations that ran."""

    def counts(self) -> Counts: ...


@dataclass
class Measured:
    """Times and memory of one implementation."""

    times: dict[str, list[float]] = field(default_factory=dict)
    """direction → seconds"""
    peak_bytes: int = 0
    status: str | None = None
    """why there are no times; None: there are"""
    detail: str = ""

    def row(self, row: Row, verdict: Verdict | None, peaks: Mapping[str, float]) -> Row:
        """The row with the numbers of its direction behind the gate, and its share of what the device could reach."""
        if self.status is not None or verdict is None:
            return row.without_numbers(self.status or FAILED, self.detail)
        row = replace(row, error=verdict.error, detail=verdict.detail)
        if not verdict.error <= 1:
            reason = f"error is {verdict.error:.3g} times what is allowed"
            return row.without_numbers(FAILED, "; ".join(filter(None, (reason, verdict.detail))))
        times = self.times[row.direction]
        p20, p50, p80 = (float(value) for value in np.percentile(times, [20, 50, 80]))
        row = replace(row, repeats=len(times), p20=p20, p50=p50, p80=p80, peak_bytes=self.peak_bytes)
        if not p50 or row.flops is None or row.bytes is None:
            return row
        return replace(row, roofline=max(row.flops / peaks[row.dtype], row.bytes / peaks["bandwidth"]) / p50)


def measure(
    row: Row,
    case: Case,
    impls: Sequence[str],
    directions: Sequence[str],
    *,
    peaks: Mapping[str, float],
    seconds: float = SECONDS,
) -> list[Row]:
    """Rows of a case, numbers only of what passes the gate: a row each implementation and direction.

    Args:
        row: what the rows share.
        peaks: see `machine.measure_peaks`.
        seconds: see `take_turns`.
    """
    found = take_turns({impl: partial(case.prepare, impl) for impl in impls}, torch.device(row.device), seconds)
    ran = [impl for impl in found if found[impl].status is None]
    verdicts = case.verdicts(ran) if ran else {}
    rows, counts = [], case.counts()
    for impl in impls:
        for direction in directions:
            flops, size = counts[direction]
            own = replace(row, impl=impl, direction=direction, flops=flops, bytes=size)
            rows.append(found[impl].row(own, verdicts.get(impl), peaks))
    return rows


def take_turns(
    make: Mapping[str, Callable[[], Call]], device: torch.device, seconds: float = SECONDS
) -> dict[str, Measured]:
    """Measure implementations in turns: a repetition of each, then the next of each.

    Args:
        make: name → function that prepares it. May raise `Unavailable`.
        device: where they run.
        seconds: of repetitions that a fast one is given.
    """
    found = {name: Measured() for name in make}
    calls: dict[str, Call] = {}
    left: dict[str, int] = {}
    warmed_up: set[str] = set()
    for name, prepare in make.items():
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
    gc.freeze()  # what is imported stays: looking through it costs 0.2 s before every repetition
    turn = 1
    while any(left.values()):
        for name in [name for name, count in left.items() if count]:
            times = _repeat(found[name], calls[name], turn, device)
            left[name] = 0 if times is None else left[name] - 1
            if times is None:
                continue
            _keep(found[name], times)
            if turn == 1 and name in warmed_up:  # the first, dropped, took too long to tell
                left[name] = min(max(int(seconds / max(*times.values(), 1e-6)), FEWEST), MOST) - 1
        turn += 1
    return found


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included; on a GPU between two events, without the time to launch."""
    if device.type != "cuda":
        return timed(function, device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


@contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """Counts the FLOPs of matrix products, attention as plain products, which torch's counter knows on every device."""
    # It knows baddbmm in one of its variants only.
    known = {torch.ops.aten.baddbmm_: lambda into, left, right, **_: 2 * math.prod(left) * right[-1]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=known) as counter:
        yield counter


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Limit this process's memory: a request for more than there is gets an error where Linux would kill it."""
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_limit(), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


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
        measured.status, measured.detail = UNAVAILABLE, str(error)
    except Exception as error:  # a broken implementation must not end the others
        measured.status, measured.detail = failure(error)
    return None


def failure(error: Exception) -> tuple[str, str]:
    """Status and reason of what broke.

    Not every message that speaks of memory does not fit: a bad access and too little shared memory are mistakes.
    """
    told = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")
    large = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in told)
    if not large:
        traceback.print_exc()
    elif torch.cuda.is_available():
        torch.cuda.empty_cache()
    return TOO_LARGE if large else FAILED, f"{type(error).__name__}: {first_line(error)}"[:200]

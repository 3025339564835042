"""The registry of all that can be measured, and jobs: an entry of it at some shapes. `bench` runs one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any

import torch

from pspg.engine.utils.errors import UserError
from pspg.engine.utils.numerics import fix_numerics

from .harness import SECONDS, Case, Sizes, bounded_memory, failure, measure
from .machine import DTYPES, measure_peaks
from .operator_case import OperatorCase
from .operators import OPERATORS
from .rows import Row

DIRECTIONS = ("forward", "backward", "both")
NARROW = {"W": 64, "layers": 2, "heads": 2, "D": 128, "H": 64}
"""a text side that a CPU can run for hundreds of classes"""
GROWTH: dict[str, tuple[int, ...]] = {
    "C": (2, 4, 8, 16, 32, 64, 128, 250, 500),
    "B": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "n": (4, 6, 8, 12, 16, 24, 32),
}


@dataclass(frozen=True)
class Entry:
    """Something that can be measured: `make` gives its case at some sizes, dtype and device.

    Attributes:
        group: part of the results that it belongs to.
        letters: letter → default size.
        impls: implementations, the literal one first.
    """

    group: str
    letters: Mapping[str, int]
    impls: tuple[str, ...]
    make: Callable[[Sizes, str, torch.device], Case]
    directions: tuple[str, ...] = ("both",)
    dtypes: tuple[str, ...] = tuple(DTYPES)

    def mistake(self, sizes: Sizes) -> str | None:
        """Mistake in the sizes, in a few words; None: there is none."""
        least = {"C": 2, "layers": 2, "batches": 2, "workers": 0}
        for letter, size in sizes.items():
            if size < least.get(letter, 1):
                return f"{letter}={size} is below {least.get(letter, 1)}"
        for width in {"W", "H", "D"} & sizes.keys() if "heads" in sizes else ():
            if sizes[width] % sizes.heads:
                return f"{sizes.heads} heads do not divide {width}={sizes[width]}"
        if 2 * sizes.get("n", 0) + 2 > 77:
            return f"n={sizes.n}: two prompts do not fit into 77 tokens; 37 is the most"
        return None


def _operator(name: str, sizes: Sizes, dtype: str, device: torch.device) -> Case:
    return OperatorCase(OPERATORS[name], sizes, DTYPES[dtype], device)


@cache
def registry() -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries by name; and modules that are left out, with the name of the package that they miss.

    Operators need torch, triton and numpy, the others what the engine needs.
    """
    impls = ("reference", "repaired", "eager", "compiled", "triton")
    entries = {
        name: Entry("operators", operator.letters, impls, partial(_operator, name), DIRECTIONS)
        for name, operator in OPERATORS.items()
    }
    missing = {}
    for module in ("steps", "loaders"):
        try:
            entries |= importlib.import_module(f".{module}", __package__).entries()
        except ModuleNotFoundError as error:
            missing[module] = error.name or str(error)
    return entries, missing


@dataclass(frozen=True)
class Job:
    """Cases of one entry, measured one after the other.

    Attributes:
        shape: letter → sizes, those of C, B and n and of what was chosen; all combinations are measured.
        rank: jobs of a lower rank run first.
        seconds: of repetitions of a fast implementation; None: 3, or 0.1 where there are several cases.
    """

    op: str
    shape: Mapping[str, tuple[int, ...]]
    dtype: str
    impls: tuple[str, ...]
    directions: tuple[str, ...]
    rank: int = 0
    seconds: float | None = None

    @property
    def key(self) -> str:
        """Unique name, such as operators/spcl/C14-B16-n16-fp32 or growth/text_side/C."""
        varied = "".join(letter for letter, sizes in self.shape.items() if len(sizes) > 1)
        if varied:
            return f"growth/{self.op}/{varied}"
        shape = "".join(f"{letter}{size}-" for letter, (size,) in self.shape.items())
        return f"{registry()[0][self.op].group}/{self.op}/{shape}{self.dtype}"

    def run(self, device: torch.device, peaks: Mapping[str, float]) -> Iterator[Row]:
        """Rows of every case, direction and implementation."""
        asked, entry, several = (self.impls, self.directions), registry()[0][self.op], self.key.startswith("growth/")
        seconds = (0.1 if several else SECONDS) if self.seconds is None else self.seconds
        for combination in product(*self.shape.values()):
            shown = dict(zip(self.shape, combination, strict=True))
            row = Row(job=self.key, operator=self.op, impl="", sizes=shown, device=device.type, dtype=self.dtype)
            try:
                with bounded_memory() if device.type == "cpu" else nullcontext():
                    case = entry.make(Sizes({**entry.letters, **shown}), self.dtype, device)
                    rows = measure(row, case, *asked, peaks=peaks, seconds=seconds)
            except Exception as error:  # its inputs or its oracle: no implementation can be judged
                status, reason = failure(error)
                named = [replace(row, impl=impl, direction=direction) for impl, direction in product(*asked)]
                rows = [one.without_numbers(status, reason) for one in named]
            yield from rows


def make_job(
    op: str,
    shape: Mapping[str, int | Sequence[int]],
    device: str,
    *,
    dtype: str | None = None,
    impls: Sequence[str] = (),
    directions: Sequence[str] = (),
) -> Job:
    """A job of checked arguments.

    Args:
        shape: letter → size or sizes; the others have their defaults.
        dtype: by default bf16 on a GPU and fp32 elsewhere.
        impls: by default all but `compiled`.
        directions: by default all.

    Raises:
        UserError: a name or size that is not possible, with what is.
    """
    entries, missing = registry()
    if op not in entries:
        gone = "".join(f"; {module} need {name}, which is not installed" for module, name in missing.items())
        raise UserError(f"--op {op}: no such operator; choose from {', '.join(entries)}{gone}")
    entry = entries[op]
    sizes = {letter: (size,) if isinstance(size, int) else tuple(size) for letter, size in shape.items()}
    known = ", ".join(f"{letter}={size}" for letter, size in entry.letters.items())
    for letter in sizes.keys() - entry.letters.keys():
        raise UserError(f"--shape {letter}: {op} has no such letter; it has {known}")
    shown = {letter: sizes.get(letter, (size,)) for letter, size in entry.letters.items() if letter in {*sizes, *"CBn"}}
    for combination in product(*shown.values()):
        if mistake := entry.mistake(Sizes({**entry.letters, **dict(zip(shown, combination, strict=True))})):
            raise UserError(f"--shape {mistake} ({op} has {known} by default)")
    dtype = dtype or ("bf16" if device == "cuda" and "bf16" in entry.dtypes else entry.dtypes[0])
    asked = (("--dtype", [dtype], entry.dtypes), ("--impl", impls, entry.impls))
    for option, given, possible in (*asked, ("--direction", directions, entry.directions)):
        for name in given:
            if name not in possible:
                raise UserError(f"{option} {name}: {op} has {', '.join(possible)}")
    chosen = tuple(impl for impl in entry.impls if impl in (impls or {*entry.impls} - {"compiled"}))
    return Job(op, shown, dtype, chosen, tuple(name for name in entry.directions if name in (directions or DIRECTIONS)))


def bench(
    op: str,
    *,
    impl: str | Sequence[str] = (),
    direction: str | Sequence[str] = (),
    dtype: str | None = None,
    device: str = "auto",
    seconds: float | None = None,
    **shape: int | Sequence[int],
) -> list[Row]:
    """Measure an operator, a step or a loader: `bench("spcl", C=193, impl=("eager", "triton"))`.

    Args:
        op, impl, direction, dtype: as `python -m benchmarks.run --list` shows them; see `make_job` for the defaults.
        device: cpu, cuda or auto.
        seconds: of repetitions that a fast implementation is given: at least 5 repetitions and at most 50.
        shape: letter = size or sizes.

    Returns:
        A row each shape, implementation and direction. What is wrong, cannot run or does not fit has a status and
        `detail`, and no numbers.

    Raises:
        UserError: a name or size that is not possible.
    """
    where = torch.device(device_of(device))
    impls, directions = ((name,) if isinstance(name, str) else tuple(name) for name in (impl, direction))
    job = make_job(op, shape, where.type, dtype=dtype, impls=impls, directions=directions)
    return list(replace(job, seconds=seconds).run(where, peaks_of(where, (job.dtype,))))


def device_of(name: str) -> str:
    """cpu or cuda, of auto what is there; numbers are then as fixed as in a run.

    Raises:
        UserError: cuda without a GPU, or another name.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: choose from auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU")
    found = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    fix_numerics(torch.device(found))
    return found


@cache
def peaks_of(device: torch.device, dtypes: tuple[str, ...]) -> Mapping[str, float]:
    """`measure_peaks`, once a process."""
    return measure_peaks(device, dtypes)


def standard_jobs(device: str) -> list[Job]:
    """Jobs of `make bench`, the most important first: on a GPU the largest class list that people train."""
    entries, cpu = registry()[0], device == "cpu"
    found: list[Job] = []

    def add(rank: int, group: str, impls: Sequence[str] = (), dtype: str | None = None, **shape: Any) -> None:
        for name in [name for name, entry in entries.items() if group in (name, entry.group)]:
            sizes = {letter: size for letter, size in shape.items() if letter in entries[name].letters}
            # On a CPU compiling can take longer than all the rest of a job.
            slow = cpu and (rank > 0 or name in ("spcl", "text_tower"))
            chosen = impls or [impl for impl in entries[name].impls if not (slow and impl == "compiled")]
            job = make_job(name, sizes, device, dtype=dtype, impls=chosen)
            if job.key not in [other.key for other in found]:
                found.append(replace(job, rank=rank))

    gpu_cases = [(108, 64), (14, 64), (28, 64), (193, 64), (108, 16), (108, 256)]
    triton = () if cpu else ("triton",)
    for number, (C, B) in enumerate([(14, 16), (28, 8)] if cpu else gpu_cases):
        add(20 * min(number, 2), "operators", C=C, B=B)
        add(10 + number, "phase2_step", ("reference", "repaired", "eager", *triton), C=C, B=B)
    if not cpu:
        add(60, "operators", dtype="fp32", C=108, B=64)
    base: dict[str, Any] = {"C": 32, "B": 16, "n": 8, **NARROW} if cpu else {"C": 108, "B": 64, "n": 16}
    for letter, sizes in GROWTH.items():
        add(30, "text_side", ("eager", *(triton or ("sampled",))), **{**base, letter: sizes})
    add(40, "loaders")
    return sorted(found, key=lambda job: job.rank)

"""Jobs: an entry of the registry at some shapes. `bench` runs one here; `standard_jobs` are those of `make bench`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any

import torch

from pspg.engine.errors import UserError

from .harness import SECONDS, Sizes, Started, Without, measure
from .machine import measure_peaks
from .registry import DIRECTIONS, Entry, registry
from .rows import NOT_RUN, UNAVAILABLE, Row

NARROW = {"W": 64, "layers": 2, "heads": 2, "D": 128, "H": 64}
"""a text side that a CPU can run for hundreds of classes"""
GROWTH = {
    "C": (2, 4, 8, 16, 32, 64, 128, 250, 500),
    "B": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "n": (4, 6, 8, 12, 16, 24, 32),
}


@dataclass(frozen=True)
class Job:
    """Cases of one entry, measured one after the other; pickled to the process that runs it."""

    op: str
    shape: Mapping[str, tuple[int, ...]]
    """letter → sizes, those of C, B and n and of what was chosen; all combinations are measured"""
    dtype: str
    impls: tuple[str, ...]
    directions: tuple[str, ...]
    rank: int = 0
    """jobs of a lower rank run first"""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """implementation → why it is `not run`"""
    seconds: float | None = None
    """of repetitions of a fast implementation; None: 3, and 0.1 at each of several shapes"""

    @property
    def varied(self) -> str:
        """The letters with several sizes."""
        return "".join(letter for letter, sizes in self.shape.items() if len(sizes) > 1)

    @property
    def key(self) -> str:
        """Unique name, such as operators/spcl/C14-B16-n16-fp32 or growth/text_side/C."""
        if self.varied:
            return f"growth/{self.op}/{self.varied}"
        shape = "-".join(f"{letter}{size}" for letter, (size,) in self.shape.items())
        return f"{registry()[0][self.op].group}/{self.op}/{shape}-{self.dtype}"

    def run(
        self, device: torch.device, peaks: Mapping[str, float], without: Without, started: Started = lambda label: None
    ) -> Iterator[Row]:
        """Rows of every implementation; what `without` names by its label, such as `eager C14 B16`, is not run."""
        entry = registry()[0][self.op]
        for combination in product(*self.shape.values()):
            shown = dict(zip(self.shape, combination, strict=True))
            row = Row(job=self.key, operator=self.op, impl="", sizes=shown, device=device.type, dtype=self.dtype)
            left_out = {f"{impl} {row.shape}": (NOT_RUN, why) for impl, why in self.left_out.items()}
            if device.type != "cuda":
                left_out[f"triton {row.shape}"] = UNAVAILABLE, "kernels need a GPU of compute capability 8.0 or newer"
            case = entry.make(Sizes({**entry.letters, **shown}), self.dtype, device)
            yield from measure(
                row,
                case,
                self.impls,
                self.directions,
                device,
                peaks=peaks,
                without={**left_out, **without},
                started=started,
                seconds=(0.1 if self.varied else SECONDS) if self.seconds is None else self.seconds,
            )


def make_job(
    op: str,
    shape: Mapping[str, int | Sequence[int]],
    device: str,
    *,
    dtype: str | None = None,
    impls: Sequence[str] = (),
    directions: Sequence[str] = (),
    rank: int = 0,
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
    for letter in sizes.keys() - entry.letters.keys():
        known = ", ".join(f"{name}={size}" for name, size in entry.letters.items())
        raise UserError(f"--shape {letter}: {op} has no such letter; it has {known}")
    shown = {letter: sizes.get(letter, (size,)) for letter, size in entry.letters.items() if letter in {*sizes, *"CBn"}}
    for combination in product(*shown.values()):
        mistake = entry.mistake(Sizes({**entry.letters, **dict(zip(shown, combination, strict=True))}))
        if mistake:
            raise UserError(f"--shape {mistake}")
    if dtype is None:
        dtype = entry.dtypes[0] if device == "cpu" or len(entry.dtypes) == 1 else "bf16"
    _check("--dtype", [dtype], entry.dtypes, op)
    _check("--impl", impls, entry.impls, op)
    _check("--direction", directions, entry.directions, op)
    chosen = [impl for impl in entry.impls if impl in impls or (not impls and impl != "compiled")]
    towards = tuple(name for name in DIRECTIONS if name in (directions or entry.directions))
    return Job(op, shown, dtype, tuple(chosen), towards, rank)


def _check(option: str, given: Sequence[str], known: Sequence[str], op: str) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"{option} {name}: {op} has {', '.join(known)}")


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
    """Measure an operator, a step or a loader in this process: `bench("spcl", C=193, impl=("eager", "triton"))`.

    Args:
        op, impl, direction, dtype: as `python -m benchmarks.run --list` shows them; see `make_job` for the defaults.
        device: cpu, cuda or auto.
        seconds: of repetitions that a fast implementation is given; at least 5 repetitions and at most 50.
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
    job = replace(job, seconds=seconds)
    return list(job.run(where, peaks_of(where, (job.dtype,)), {}))


def device_of(name: str) -> str:
    """cpu or cuda, of auto what is there.

    Raises:
        UserError: cuda without a GPU.
    """
    there = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: choose from auto, cpu, cuda")
    if name == "cuda" and not there:
        raise UserError("--device cuda: torch sees no GPU")
    return ("cuda" if there else "cpu") if name == "auto" else name


@cache
def peaks_of(device: torch.device, dtypes: tuple[str, ...]) -> Mapping[str, float]:
    """`measure_peaks`, once a process."""
    return measure_peaks(device, dtypes)


def standard_jobs(device: str) -> list[Job]:
    """What `make bench` measures, the most important first: the largest vocabulary that people train, on a GPU."""
    entries, _ = registry()
    found: list[Job] = []

    def add(rank: int, names: Sequence[str], impls: Sequence[str] = (), dtype: str | None = None, **shape: Any) -> None:
        for name in names:
            if name in entries:
                letters = entries[name].letters
                own = {letter: size for letter, size in shape.items() if letter in letters}
                found.append(make_job(name, own, device, dtype=dtype, impls=impls or entries[name].impls, rank=rank))

    operators = [name for name, entry in entries.items() if entry.group == "operators"]
    by_batch = [name for name in operators if "B" in entries[name].letters]
    loaders = [name for name, entry in entries.items() if entry.group == "loaders"]
    if device == "cpu":
        cases, base = [(14, 16), (28, 8)], {"C": 32, "B": 16, "n": 8, **NARROW}
        step, growth = ("reference", "repaired", "eager"), ("eager", "sampled")
    else:
        cases, base = [(108, 64), (14, 64), (28, 64), (193, 64), (108, 16), (108, 256)], {"C": 108, "B": 64, "n": 16}
        step, growth = ("reference", "repaired", "eager", "triton"), ("eager", "triton")
    for number, (C, B) in enumerate(cases):
        known = operators if B == 64 or device == "cpu" else by_batch
        add(20 * min(number, 2), known, C=C, B=B)
        add(10 + number, ["phase2_step"], step, C=C, B=B)
    add(60, operators if device == "cuda" else [], dtype="fp32", C=108, B=64)
    add(22, ["phase1_step"], B=8 if device == "cpu" else 64)
    for letter, sizes in GROWTH.items():
        add(30, ["text_side"], growth, **{**base, letter: sizes})
    add(40, loaders)
    return sorted((_without_slow(job, entries[job.op], device) for job in found), key=lambda job: job.rank)


def _without_slow(job: Job, entry: Entry, device: str) -> Job:
    if device != "cpu" or "compiled" not in job.impls or (job.rank == 0 and not entry.slow_to_compile):
        return job
    why = "left out on a CPU: compiling takes longer than the rest of the job"
    return replace(job, left_out={"compiled": why})

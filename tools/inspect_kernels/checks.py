"""Limits that `--check` holds compiled kernels to, and a model of their time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from pspg.kernels.cases import Case
from pspg.kernels.launch import Launch, tensors_of

from .compiling import Resources, jit_function

SHARED_LIMITS = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""architecture → bytes of shared memory that one program can have"""
BANDWIDTH, TENSOR_RATE, LAUNCH_SECONDS = 4.8e12, 790e12, 2e-6
"""constants of the model: bytes/s, FLOP/s, s"""
ISSUE_RATE = 132 * 2 * 1.83e9
"""instructions of warps a second: 132 processors, half of the four that each could issue a cycle"""
ASSUMPTIONS = (
    "Time on one H200: a model, not measured. Every distinct tensor that a launch is given moves once, whole, at "
    "4.8 TB/s (gathers, partial reads and second reads are not seen); products run at 790 TFLOP/s (dense bf16; tf32x3, "
    "three products at half the rate, counts six-fold; `-` where the case states none); warps issue 2 instructions a "
    "cycle on each of 132 processors at 1.83 GHz: their code once a program, and its longest loop (as compiled for "
    "sm_90) once for every turn that the case states, elsewhere once, which is too few where it runs over an inner "
    "length. The slowest of the three counts, and 2 µs for each launch."
)


@dataclass(frozen=True)
class Row:
    """A compiled kernel in a case."""

    case: str
    kernel: str
    dtype: str
    architecture: int
    launches: int
    options: str
    resources: Resources
    may_spill: bool = False
    """outside of loops of products"""


def violations(row: Row) -> list[str]:
    """A line for each thing that is refused."""
    used, limit = row.resources, SHARED_LIMITS[row.architecture]
    found = []
    if used.error:
        found.append(f"does not compile: {used.error}")
    if used.spill_bytes and (used.spills_in_products or not row.may_spill):
        found.append(f"spills {used.spill_bytes} bytes of registers")
    if used.shared_bytes > limit:
        found.append(f"shared memory of {used.shared_bytes} bytes, the limit is {limit}")
    # ieee products of fp32 are made of FFMA.
    products = [kind for kind in used.dots if kind != "ieee"]
    if products and not used.tensor_instructions:
        found.append(f"products of {', '.join(products)} without a tensor-core instruction")
    return [f"{row.kernel} ({row.case}, {row.dtype}, sm_{row.architecture}): {line}" for line in found]


@dataclass(frozen=True)
class Estimate:
    """Work of all launches of a kernel in a case, and the model's time for it."""

    case: str
    kernel: str
    dtype: str
    launches: int
    bytes: int
    flops: float | None
    loop: int | None
    """instructions of the longest loop; None: of several kernels"""
    instructions: float
    """issued by all warps"""
    seconds: float
    bound: str
    """what takes longest in most launches: bytes, products or issue"""


def estimate(case: Case, dtype: str, launches: Sequence[Launch], used: Sequence[Resources]) -> list[Estimate]:
    """Estimates by kernel, in the order of the first launch; with several kernels, their sum comes last.

    Args:
        used: of each launch, for sm_90.
    """
    by_kernel: dict[str, list[tuple[Launch, Resources]]] = {}
    for launch, resources in zip(launches, used, strict=True):
        by_kernel.setdefault(launch_name(launch), []).append((launch, resources))
    found = []
    for name, group in by_kernel.items():
        count = case.flops.get(name.rpartition(".")[2])
        sizes = [_distinct_bytes(launch.arguments.values()) for launch, _ in group]
        products = [count(launch.arguments) if count else 0.0 for launch, _ in group]
        issued = [_issued(case, launch, resources) for launch, resources in group]
        times = [
            {"bytes": size / BANDWIDTH, "products": product / TENSOR_RATE, "issue": number / ISSUE_RATE}
            for size, product, number in zip(sizes, products, issued, strict=True)
        ]
        found.append(
            Estimate(
                case.name,
                name,
                dtype,
                len(group),
                sum(sizes),
                sum(products) if count else None,
                max(resources.loop for _, resources in group),
                sum(issued),
                sum(max(time.values()) + LAUNCH_SECONDS for time in times),
                Counter(max(time, key=lambda part: time[part]) for time in times).most_common(1)[0][0],
            )
        )
    if len(found) > 1:
        stated = [part.flops for part in found if part.flops is not None]
        flops = sum(stated) if stated else None
        size, seconds = sum(part.bytes for part in found), sum(part.seconds for part in found)
        instructions = sum(part.instructions for part in found)
        found.append(Estimate(case.name, "all", dtype, len(launches), size, flops, None, instructions, seconds, "-"))
    return found


def _issued(case: Case, launch: Launch, resources: Resources) -> float:
    """Instructions of all warps: the code outside the longest loop once a program, the loop for each of its turns."""
    programs = prod(launch.grid)
    turns = case.trips.get(launch_name(launch).rpartition(".")[2])
    trips = turns(launch.arguments) if turns else programs
    outside = resources.instructions - resources.loop
    return launch.options.get("num_warps", 4) * (programs * outside + trips * resources.loop)


def launch_name(launch: Launch) -> str:
    """Name of the kernel that is launched."""
    function = jit_function(launch.kernel).fn
    return display_name(function.__module__, function.__qualname__)


def display_name(module: str, kernel: str) -> str:
    """pspg.kernels.pair_loss.triton, _pairs_kernel → pair_loss._pairs_kernel"""
    return f"{module.removeprefix('pspg.kernels.').partition('.')[0]}.{kernel.rpartition('.')[2]}"


def _distinct_bytes(arguments: Iterable[Any]) -> int:
    views = {}
    for argument in arguments:
        for tensor in tensors_of("", argument).values():
            key = tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
            # Along an expanded dimension there is one row.
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            views[key] = torch.Size(size for size, step in steps if step).numel() * tensor.element_size()
    return sum(views.values())

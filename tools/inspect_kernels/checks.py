"""Limits that `--check` holds compiled kernels to, and a model of their time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pspg.kernels.cases import Case
from pspg.kernels.launch import Launch, tensor_of

from .compiling import Resources, jit_function

SHARED_LIMITS = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""architecture → bytes of shared memory that one program can have"""
BANDWIDTH, TENSOR_RATE, LAUNCH_SECONDS = 4.8e12, 790e12, 2e-6
"""constants of the model: bytes/s, FLOP/s, s"""
ASSUMPTIONS = (
    "Time on one H200: a model, not measured. Every distinct tensor that a launch is given moves once, whole, at "
    "4.8 TB/s (gathers, partial reads and second reads are not seen); products run at 790 TFLOP/s (dense bf16; tf32x3, "
    "three products at half the rate, counts six-fold; `-` where the case states none); the slower of the two counts, "
    "and 2 µs for each launch."
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


def violations(row: Row) -> list[str]:
    """A line for each thing that is refused."""
    used, limit = row.resources, SHARED_LIMITS[row.architecture]
    found = []
    if used.error:
        found.append(f"does not compile: {used.error}")
    if used.spill_bytes:
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
    seconds: float


def estimate(case: Case, dtype: str, launches: Sequence[Launch]) -> list[Estimate]:
    """Estimates by kernel, in the order of the first launch; with several kernels, their sum comes last."""
    by_kernel: dict[str, list[Launch]] = {}
    for launch in launches:
        by_kernel.setdefault(launch_name(launch), []).append(launch)
    found = []
    for name, group in by_kernel.items():
        count = case.flops.get(name.rpartition(".")[2])
        sizes = [_distinct_bytes(launch.arguments.values()) for launch in group]
        products = [count(launch.arguments) if count else 0.0 for launch in group]
        seconds = sum(
            max(size / BANDWIDTH, product / TENSOR_RATE) + LAUNCH_SECONDS
            for size, product in zip(sizes, products, strict=True)
        )
        flops = sum(products) if count else None
        found.append(Estimate(case.name, name, dtype, len(group), sum(sizes), flops, seconds))
    if len(found) > 1:
        stated = [part.flops for part in found if part.flops is not None]
        flops = sum(stated) if stated else None
        size, seconds = sum(part.bytes for part in found), sum(part.seconds for part in found)
        found.append(Estimate(case.name, "all", dtype, len(launches), size, flops, seconds))
    return found


def launch_name(launch: Launch) -> str:
    """Name of the kernel that is launched."""
    function = jit_function(launch.kernel).fn
    return display_name(function.__module__, function.__qualname__)


def display_name(module: str, kernel: str) -> str:
    """pspg.kernels.pair_loss.triton, _pairs_kernel → pair_loss._pairs_kernel"""
    return f"{module.removeprefix('pspg.kernels.').partition('.')[0]}.{kernel.rpartition('.')[2]}"


def _distinct_bytes(arguments: Iterable[Any]) -> int:
    views = {}
    for tensor in map(tensor_of, arguments):
        if tensor is not None:
            key = tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
            # Along an expanded dimension there is one row.
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            views[key] = torch.Size(size for size, step in steps if step).numel() * tensor.element_size()
    return sum(views.values())

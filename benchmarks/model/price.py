"""The time of a traced step by the table of assumptions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .assumptions import Assumptions
from .trace import FILLS, OPTIMIZER, Operation, Step

SPLITS = (1, 2, 4, 8, 16)
_PRODUCTS = frozenset(["mm", "addmm", "bmm", "baddbmm", "baddbmm_"])
_TRIPS: Mapping[str, Callable[[Mapping[str, Any]], int]] = {
    name: lambda a: a["qkv"][0] * a["heads"] for name in ("_attention_kernel", "_attention_backward_kernel")
}
"""kernel → turns of its loop over all programs, of the shapes and numbers that it is given"""


@dataclass
class Totals:
    """Sums over operations."""

    launches: int = 0
    bytes: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def add(self, operation: Operation, seconds: float) -> None:
        self.launches += operation.kernels
        self.bytes += operation.read + operation.written
        self.flops += operation.flops
        self.seconds += seconds


def price_step(step: Step, table: Assumptions) -> tuple[dict[str, Totals], dict[str, Totals]]:
    """Totals by part of the step, and by kind of operation."""
    parts: dict[str, Totals] = {}
    kinds: dict[str, Totals] = {}
    for operation in step.operations:
        seconds = price(operation, table)
        parts.setdefault(operation.part, Totals()).add(operation, seconds)
        kinds.setdefault(kind(operation), Totals()).add(operation, seconds)
    return parts, kinds


def kind(operation: Operation) -> str:
    """Kind of an operation: the name of its kernel, or what torch's operator is."""
    name = operation.name
    if operation.launch is not None:
        module = operation.launch.kernel.fn.__module__.removeprefix("pspg.kernels.")
        operator = module.partition(".")[0]
        return name.strip("_").removesuffix("_kernel") if operator == "text_tower" else operator
    if name in _PRODUCTS:
        return "products"
    if name.startswith("convolution"):
        return "convolutions"
    if name.startswith("_scaled_dot_product"):
        return "torch's attention"
    if name in FILLS:
        return "fills"
    return "optimizer" if name.startswith("_fused") else "passes"


def price(operation: Operation, table: Assumptions) -> float:
    """Seconds of an operation, the gaps before its kernels included."""
    gap = 1e-6 * (table.host_gap_us if operation.part == OPTIMIZER else table.gap_us)
    return _busy(operation, table) + operation.kernels * gap


def _busy(operation: Operation, table: Assumptions) -> float:
    moved = operation.read + operation.written
    stream = moved / (table.bandwidth_share * table.bandwidth)
    name = operation.name
    if operation.launch is not None:
        return max(_launch(operation, table), 1e-6 * table.kernel_us.get(name, table.shortest_pass_us))
    if name in _PRODUCTS:
        return _product(operation, table)
    if name.startswith("convolution"):
        # The bias is a pass of its own.
        bias = _pass(operation.written, operation.written, table) if operation.kernels > 1 else 0.0
        return max(operation.flops / (table.convolution_share * table.product_rate), stream) + bias
    if name.startswith("_scaled_dot_product"):
        # Backward's first input is the gradient of the result, of the queries' shape.
        sequences = math.prod(operation.shapes[0][:-2])
        return max(stream, 1e-6 * table.attention_us * sequences * (5 if "backward" in name else 1))
    return max(_pass(operation.read, operation.written, table), operation.kernels * 1e-6 * table.shortest_pass_us)


def _pass(read: float, written: float, table: Assumptions) -> float:
    return (table.read_share * read + written) / (table.bandwidth_share * table.bandwidth)


def _product(operation: Operation, table: Assumptions) -> float:
    """Waves of the best tile, its inner length perhaps split; never less than the bytes take."""
    left, right = operation.shapes[-2:]
    count, m, k, n = (left[0] if len(left) == 3 else 1), left[-2], left[-1], right[-1]
    measured = table.product_us.get(f"{count}x{m}x{n}x{k}")
    if measured is not None:
        return 1e-6 * measured
    rate = table.float32_rate if operation.dtype == torch.float32 else table.product_rate
    best = math.inf
    for tile, share in table.tile_share.items():
        rows, columns = map(int, tile.split("x"))
        tiles = math.ceil(m / rows) * math.ceil(n / columns) * count
        for split in SPLITS:
            if split > 1 and (tiles * split > table.processors or k // split < 128):
                break
            waves = math.ceil(tiles * split / table.processors)
            seconds = waves * (
                2 * rows * columns * k / split * table.processors / (rate * share) + 1e-6 * table.tile_us
            )
            if split > 1:
                partial = 2 * 4 * split * count * m * n
                seconds += 1e-6 * table.split_us + partial / (table.bandwidth_share * table.bandwidth)
            best = min(best, seconds)
    moved = operation.read + operation.written
    return max(best, moved / (table.bandwidth_share * table.bandwidth), 1e-6 * table.shortest_product_us)


def _launch(operation: Operation, table: Assumptions) -> float:
    """The longest of what a kernel moves, issues, and waits for, one turn of its loop after the other."""
    assert operation.launch is not None
    name, launch = operation.name, operation.launch
    seconds = _pass(operation.read, operation.written, table)
    if name not in _TRIPS:
        return seconds
    trips = _TRIPS[name](launch.arguments)
    warps = launch.options.get("num_warps", 4)
    issued = trips * warps * table.trip_instructions[name]
    issue = issued / (table.processors * table.issue_per_cycle * table.clock)
    turns = math.ceil(trips / math.prod(launch.grid))
    return max(seconds, issue, 1e-6 * table.trip_us[name] * turns)

"""The time of a traced step by the table of assumptions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .assumptions import Assumptions
from .trace import FILLS, IMAGE, OPTIMIZER, Operation, Step

SPLITS = (1, 2, 4, 8, 16)
FUSED = frozenset(["_linear_kernel", "_add_linear_kernel", "_activation_backward_kernel", "_norm_backward_kernel"])
"""products of the text tower with their neighbours inside"""
_PRODUCTS = frozenset(["mm", "addmm", "bmm", "baddbmm", "baddbmm_"])


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


def with_selectable(step: Step) -> Step:
    """The step with the forms that can be chosen and are not the default before a GPU has run them.

    Convolutions of the image tower with bias, residual and ReLU inside; decoder kernels each of which is set up while
    the one before ends, so that nothing lies between them.
    """
    found = []
    for operation in step.operations:
        if operation.part == IMAGE and operation.name in ("relu_", "add_"):
            continue
        if operation.name.startswith("convolution"):
            operation = replace(operation, kernels=1)
        elif kind(operation) == "prompt_decoder":
            operation = replace(operation, overlapped=True)
        found.append(operation)
    return replace(step, operations=found)


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
    if operation.overlapped:
        gap = 0.0
    return _busy(operation, table) + operation.kernels * gap


def _busy(operation: Operation, table: Assumptions) -> float:
    moved = operation.read + operation.written
    stream = moved / (table.bandwidth_share * table.bandwidth)
    name = operation.name
    if operation.launch is not None and name in FUSED:
        return _product(operation, table)
    if operation.launch is not None:
        return max(_launch(operation, table), 1e-6 * table.kernel_us.get(name, table.shortest_pass_us))
    if name in _PRODUCTS:
        return _product(operation, table)
    if name.startswith("convolution"):
        # The bias is a pass of its own.
        biased = name == "convolution" and operation.kernels > 1
        bias = _pass(operation.written, operation.written, table) if biased else 0.0
        return max(operation.flops / (table.convolution_share * table.product_rate), stream) + bias
    if name.startswith("_scaled_dot_product"):
        # Backward's first input is the gradient of the result, of the queries' shape.
        sequences = math.prod(operation.shapes[0][:-2])
        return max(stream, 1e-6 * table.attention_us * sequences * (5 if "backward" in name else 1))
    return max(_pass(operation.read, operation.written, table), operation.kernels * 1e-6 * table.shortest_pass_us)


def _pass(read: float, written: float, table: Assumptions) -> float:
    return (table.read_share * read + written) / (table.bandwidth_share * table.bandwidth)


def _product(operation: Operation, table: Assumptions) -> float:
    """Waves of the best tile, its inner length perhaps split; never less than the bytes take.

    A kernel of the project has the tile that it is launched with, does not split, and reaches a share of the rate.
    """
    own, tiles_of, splits = 1.0, table.tile_share, list(SPLITS)
    if operation.launch is None:
        left, right = operation.shapes[-2:]
        count, m, k, n = (left[0] if len(left) == 3 else 1), left[-2], left[-1], right[-1]
    else:
        a, own, splits = operation.launch.arguments, table.fused_share, [1]
        count, m, n, k = 1, a["rows"], a["columns"], a["depth"]
        tile = f"{a['BLOCK_M']}x{a['BLOCK_N']}"
        tiles_of = {tile: table.tile_share.get(tile, min(table.tile_share.values()))}
    measured = table.product_us.get(f"{count}x{m}x{n}x{k}") if operation.launch is None else None
    if measured is not None:
        return 1e-6 * measured
    exact = operation.launch is None and operation.dtype == torch.float32  # the project's are never in float32
    rate = own * (table.float32_rate if exact else table.product_rate)
    best = math.inf
    for tile, share in tiles_of.items():
        rows, columns = map(int, tile.split("x"))
        tiles = math.ceil(m / rows) * math.ceil(n / columns) * count
        for split in splits:
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
    if name not in table.trip_instructions:
        return seconds
    trips = operation.trips
    warps = launch.options.get("num_warps", 4)
    issued = trips * warps * table.trip_instructions[name]
    issue = issued / (table.processors * table.issue_per_cycle * table.clock)
    turns = math.ceil(trips / math.prod(launch.grid))
    return max(seconds, issue, 1e-6 * table.trip_us.get(name, 0.0) * turns)

"""The time of a traced step by the table of assumptions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .assumptions import Assumptions
from .trace import FILLS, OPTIMIZER, Operation, Step

SPLITS = (1, 2, 4, 8, 16)
FUSED = frozenset(["_linear_kernel", "_add_linear_kernel", "_activation_backward_kernel", "_norm_backward_kernel"])
"""products of the text tower with their neighbours inside"""
_PERSISTENT = {
    "forward_kernel": (
        *("gru_kernel", "linear_kernel", "self_attention_kernel", "linear_kernel", "linear_kernel"),
        *("cross_attention_kernel", "linear_kernel"),
    ),
    "backward_kernel": (
        *("cross_attention_backward_kernel", "linear_kernel", "norm_linear_backward_kernel"),
        *("norm_linear_backward_kernel", "self_attention_backward_kernel", "gru_backward_kernel"),
        "recurrence_backward_kernel",
    ),
}
"""the decoder's one launch → phases of a step, by the kernels that they are elsewhere"""
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
        gap = 1e-6 * table.overlapped_gap_us
    return _busy(operation, table) + operation.kernels * gap


def used(operation: Operation, table: Assumptions) -> float:
    """Seconds of all processors, or of all bandwidth, that an operation keeps from others that run beside it.

    Without gaps and latency, in which nothing is used, and without processors that have no tile.
    """
    nothing = dict.fromkeys(table.kernel_us, 0.0)
    free = {"shortest_pass_us": 0.0, "shortest_product_us": 0.0, "kernel_us": nothing, "trip_us": {}}
    seconds = _busy(operation, replace(table, **free), alone=False)  # type: ignore[arg-type]
    if operation.launch is not None and operation.name not in FUSED:  # small tiles
        seconds = max(seconds, operation.flops / (table.product_rate * min(table.tile_share.values())))
    return seconds


def _busy(operation: Operation, table: Assumptions, *, alone: bool = True) -> float:
    stream, name = _stream(operation, table), operation.name
    if operation.launch is not None and name in FUSED:
        return _own_product(operation, table, alone)
    if operation.launch is not None:
        return max(_launch(operation, table), 1e-6 * _least_us(operation, table))
    if name in _PRODUCTS:
        return _product(operation, table, alone)
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


def _product(operation: Operation, table: Assumptions, alone: bool) -> float:
    """Waves of the library's best tile, its inner length perhaps split; never less than the bytes take.

    Not alone, the last wave takes the part of the processors that has tiles.
    """
    left, right = operation.shapes[-2:]
    count, m, k, n = (left[0] if len(left) == 3 else 1), left[-2], left[-1], right[-1]
    measured = table.product_us.get(f"{count}x{m}x{n}x{k}")
    if measured is not None:
        return 1e-6 * measured
    rate = table.float32_rate if operation.dtype == torch.float32 else table.product_rate
    best = busy = math.inf
    for tile, share in table.tile_share.items():
        rows, columns = map(int, tile.split("x"))
        tiles = math.ceil(m / rows) * math.ceil(n / columns) * count
        for split in SPLITS:
            if split > 1 and (tiles * split > table.processors or k // split < 128):
                break
            each = 2 * rows * columns * k / split * table.processors / (rate * share) + 1e-6 * table.tile_us
            summing = 0.0
            if split > 1:
                partial = 2 * 4 * split * count * m * n
                summing = 1e-6 * table.split_us + partial / (table.bandwidth_share * table.bandwidth)
            waves = tiles * split / table.processors
            seconds = math.ceil(waves) * each + summing
            if seconds < best:
                best, busy = seconds, waves * each + summing
    return max(best if alone else busy, _stream(operation, table), 1e-6 * table.shortest_product_us)


def _own_product(operation: Operation, table: Assumptions, alone: bool) -> float:
    """A product of the project has the tile that it is launched with, does not split, and reaches a share of the rate.

    A tile ends with an epilogue that reads and writes. Of two programs on a processor one multiplies meanwhile, so that
    one epilogue of two counts; a tile beyond 128 × 128 leaves room for one program, and nothing runs beside its own.
    """
    assert operation.launch is not None
    a = operation.launch.arguments
    m, n, k, rows, columns = (a[name] for name in ("rows", "columns", "depth", "BLOCK_M", "BLOCK_N"))
    share = table.tile_share.get(f"{rows}x{columns}", min(table.tile_share.values()))
    tiles = math.ceil(m / rows) * math.ceil(n / columns)
    operands = operation.dtype.itemsize * k * (m + n)
    moved = (operation.read + operation.written - operands) / tiles
    product = 2 * rows * columns * k * table.processors / (table.fused_share * table.product_rate * share)
    epilogue = max(1e-6 * table.tile_us, moved * table.processors / (table.bandwidth_share * table.bandwidth))
    together = 1 if rows * columns > 128 * 128 else 2
    waves = math.ceil(tiles / table.processors) if alone else tiles / table.processors
    rounds = math.ceil(waves / together) if alone else waves / together
    seconds = waves * product + rounds * epilogue
    return max(seconds, _stream(operation, table), 1e-6 * table.shortest_product_us)


def _stream(operation: Operation, table: Assumptions) -> float:
    return (operation.read + operation.written) / (table.bandwidth_share * table.bandwidth)


def _least_us(operation: Operation, table: Assumptions) -> float:
    """Latency of a launch, whatever it moves; of the decoder's one launch that of all its phases, with barriers."""
    phases = _PERSISTENT.get(operation.name)
    if phases is None or operation.launch is None:
        return table.kernel_us.get(operation.name, table.shortest_pass_us)
    step = sum(table.kernel_us[name] for name in phases)
    barriers = len(phases) * table.barrier_us if step else 0.0
    steps: int = operation.launch.arguments["sizes"].steps
    return steps * (step + barriers)


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

"""What the model assumes of a GPU: one table. None of it is measured; a calibration file replaces what has been."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pspg.engine.utils.errors import UserError


@dataclass(frozen=True)
class Assumptions:
    """Of one GPU. Every field is a key of the calibration file."""

    bandwidth: float
    """bytes/s of its memory, by the data sheet"""
    product_rate: float
    """FLOP/s of dense bf16 products that a large product reaches"""
    float32_rate: float = 45e12
    """FLOP/s of float32 products, without TF32"""
    processors: int = 132
    """streaming multiprocessors"""
    clock: float = 1.83e9
    """cycles/s"""
    bandwidth_share: float = 0.85
    """of `bandwidth` that a pass over memory reaches"""
    read_share: float = 0.7
    """of the bytes that a pass reads: the others are still in the L2 cache"""
    round_us: float = 5.0
    """α: a round of a ring of GPUs"""
    node_bandwidth: float = 350e9
    """β within a node, bytes/s that a GPU sends: of NVLink's 450e9"""
    network_bandwidth: float = 45e9
    """β between nodes, bytes/s that a GPU sends: of InfiniBand's 50e9, an adapter of 400 Gbit/s a GPU"""
    host_us: float = 30.0
    """of the host to start a kernel that is not in a recorded graph, torch's operators and autograd around it"""
    gap_us: float = 1.2
    """between two kernels of a recorded graph"""
    overlapped_gap_us: float = 0.4
    """what is left of it where a kernel is set up while the one before ends"""
    barrier_us: float = 1.5
    """of a barrier of all programs, between the phases of the decoder's one launch; a phase takes its `kernel_us`"""
    host_gap_us: float = 3.0
    """between two kernels that the host starts: behind the graph"""
    shortest_pass_us: float = 1.2
    """of a kernel however small"""
    shortest_product_us: float = 2.0
    tile_us: float = 1.0
    """start and end of one tile of a product; at least, where an epilogue moves more than that"""
    split_us: float = 1.5
    """of adding up a product that was split along its inner length"""
    tile_share: Mapping[str, float] = field(
        default_factory=lambda: {
            "128x256": 1.0,
            "256x128": 1.0,
            "128x128": 0.85,
            "64x256": 0.8,
            "128x64": 0.65,
            "64x64": 0.45,
        }
    )
    """tile of a product → share of `product_rate`"""
    fused_share: float = 1.0
    """of the library's rate at the same tile that the project's own products reach; the largest unknown"""
    product_us: Mapping[str, float] = field(default_factory=dict)
    """measured products in place of the tiles: "BxMxNxK" → µs, for example "1x6239x2048x512" """
    convolution_share: float = 0.6
    """of `product_rate` that a convolution reaches"""
    attention_us: float = 0.033
    """of torch's attention with wide heads, a sequence and head; five times that backward"""
    issue_per_cycle: float = 2.0
    """instructions that a processor issues a cycle, of 4"""
    trip_instructions: Mapping[str, float] = field(
        default_factory=lambda: {"_attention_kernel": 569, "_attention_backward_kernel": 790}
    )
    """kernel → instructions of a warp in a turn of its loop over tiles of suffixes (kernels/RESOURCES.md, sm_90)"""
    trip_us: Mapping[str, float] = field(
        default_factory=lambda: {"_attention_kernel": 1.5, "_attention_backward_kernel": 2.5}
    )
    """kernel → least time of such a turn: loads, then products, then stores"""
    kernel_us: Mapping[str, float] = field(
        default_factory=lambda: {
            "gru_kernel": 6.0,
            "linear_kernel": 4.0,
            "self_attention_kernel": 4.5,
            "cross_attention_kernel": 5.5,
            "cross_attention_backward_kernel": 4.0,
            "norm_linear_backward_kernel": 7.0,
            "self_attention_backward_kernel": 6.0,
            "gru_backward_kernel": 6.5,
            "recurrence_backward_kernel": 6.5,
            "_packed_attention_kernel": 8.0,
            "_packed_attention_backward_kernel": 15.0,
            "_pairs_kernel": 15.0,
            "_vectors_kernel": 5.0,
        }
    )
    """kernel → least time of a launch, whatever it moves: latency of one tile"""


GPUS = {
    "h200": Assumptions(bandwidth=4.8e12, product_rate=790e12),
    "h100": Assumptions(bandwidth=3.35e12, product_rate=700e12),
}


def load_assumptions(gpu: str, calibration: Path | None = None) -> Assumptions:
    """The table of a GPU, with what a calibration file says in place of its entries.

    The file holds a JSON object: fields of `Assumptions` → numbers, or for the fields that are tables → numbers by
    name, which join the table's own; the same below "h200" or "h100" for one GPU alone.

    Raises:
        UserError: it cannot be read, or has a key or value that does not belong there.
    """
    table = GPUS[gpu]
    if calibration is None:
        return table
    try:
        found = json.loads(calibration.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{calibration}: cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{calibration}: must be an object of fields and numbers")
    own = {key: value for key, value in found.items() if key not in GPUS}
    for name in GPUS:
        part = found.get(name, {})
        if not isinstance(part, dict):
            raise UserError(f"{calibration}: {name} must be an object of fields and numbers")
        changed = _changed(GPUS[name], {**own, **part}, calibration)
        table = changed if name == gpu else table
    return table


def _changed(table: Assumptions, values: Mapping[str, Any], file: Path) -> Assumptions:
    names = [part.name for part in fields(Assumptions)]
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names:
            raise UserError(f"{file}: {key} is not known; keys are {', '.join([*names, *GPUS])}")
        before = getattr(table, key)
        numbers = value if isinstance(before, dict) and isinstance(value, dict) else {"": value}
        if isinstance(before, dict) != isinstance(value, dict) or not all(map(_is_positive, numbers.values())):
            wanted = "an object of positive numbers" if isinstance(before, dict) else "a positive number"
            raise UserError(f"{file}: {key} must be {wanted}, got {value!r}")
        changes[key] = {**before, **value} if isinstance(before, dict) else value
    return replace(table, **changes)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0

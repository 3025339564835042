"""Measured numbers of a probe as a calibration file of `benchmarks.model`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..model.assumptions import Assumptions

Rows = Sequence[Mapping[str, Any]]


def calibration(probes: Mapping[str, Rows], table: Assumptions) -> dict[str, Any]:
    """Fields of `Assumptions` that the rows of `probe.NAMES` give; what was not measured is left out.

    Args:
        probes: name of a probe → its rows.
        table: of the GPU by its data sheet; shares are of its rates.
    """
    found: dict[str, Any] = {}
    us = {name: {row["name"]: row["us"] for row in rows if row["us"]} for name, rows in probes.items()}
    rows = {row["name"]: row for part in probes.values() for row in part if row["us"]}
    if "gap" in rows:
        # A kernel that does nothing takes its gap and its shortest time together, halves for want of better.
        found["gap_us"] = found["shortest_pass_us"] = us["gap"]["gap"] / 2
    if "copy" in rows:
        found["bandwidth_share"] = min(rows["copy"]["gbs"] * 1e9 / table.bandwidth, 1.0)
    if "large" in rows:
        found["product_rate"] = rows["large"]["tflops"] * 1e12
        gap = found.get("gap_us", table.gap_us)
        measured = {name: max(time - gap, 0.1) for name, time in us["products"].items() if name != "large"}
        if measured:
            found["product_us"] = measured
    rate = found.get("product_rate", table.product_rate)
    plain = [row["tflops"] * 1e12 / rate for name, row in rows.items() if name.endswith(" plain")]
    if plain:
        found["convolution_share"] = min(statistics.median(plain), 1.0)
    forward = [(int(name.split()[1]), time) for name, time in us.get("attention", {}).items() if "forward" in name]
    if forward:
        sequences, time = forward[0]
        found["attention_us"] = time / sequences
    return found

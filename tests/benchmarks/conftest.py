"""Rows with made-up numbers, and fewer repetitions."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import harness, jobs
from benchmarks.rows import FAILED, Row

ENVIRONMENT: dict[str, Any] = {
    "device": "cpu",
    "machine": {"processor": "Abacus 3", "threads": 2},
    "versions": {"python": "3.11.7", "torch": "2.11.0"},
    "commit": "0123456789ab",
    "peaks": {"fp32": 1e12, "bandwidth": 1e11},
}
MILLISECONDS = {"reference": 8.0, "repaired": 4.0, "eager": 1.0}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest repetitions there can be, and peaks that need no measuring."""
    monkeypatch.setattr(jobs, "SECONDS", 0.0)
    monkeypatch.setattr(harness, "FEWEST", 2)
    monkeypatch.setattr(jobs, "peaks_of", lambda device, dtypes: {**dict.fromkeys(dtypes, 1e12), "bandwidth": 1e11})


def row(impl: str = "eager", milliseconds: float = 1.0, **changes: Any) -> Row:
    p50 = milliseconds / 1000
    base = {"job": "operators/pair_loss/C14-B8-fp32", "operator": "pair_loss", "impl": impl, "sizes": {"C": 14, "B": 8}}
    numbers = {"repeats": 9, "p20": 0.9 * p50, "p50": p50, "p80": 1.2 * p50, "peak_bytes": 2**20, "roofline": 0.5}
    return Row(**{**base, **numbers, **changes})


def rows() -> list[Row]:
    """A case in three implementations and one that FAILED, and a growth curve with exponent 2."""
    found = [row(impl, milliseconds) for impl, milliseconds in MILLISECONDS.items()]
    found.append(row("compiled").without_numbers(FAILED, "gradient of V: 3 times what is allowed"))
    for C in (2, 4, 8, 16):
        sizes = {"C": C, "B": 16}
        found.append(row("eager", C**2, job="growth/text_side/C", operator="text_side", sizes=sizes))
    return found

"""Rows with made-up numbers, in a results folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rows import FAILED, TOO_LARGE, UNAVAILABLE, Results, Row, without_numbers

ENVIRONMENT = {
    "device": "cpu",
    "machine": {"processor": "Abacus 3", "threads": 2},
    "versions": {"python": "3.11.7", "torch": "2.11.0"},
    "commit": "0123456789ab",
    "peaks": {"fp32": 1e12, "bandwidth": 1e11},
}
MILLISECONDS = {"reference": 8.0, "repaired": 4.0, "eager": 1.0}
WriteResults = Callable[..., Path]


@pytest.fixture
def rows() -> list[Row]:
    """An operator at two shapes, a step, and growth in C; one row each FAILED, unavailable, too large."""
    pairs = [operator_row(provider, C) for C in (14, 28) for provider in MILLISECONDS]
    step = replace(pairs[2], job="steps/phase2_step/C14-B8", suite="steps", operator="phase2_step", peak_bytes=2**32)
    growth = [
        replace(timed(pairs[2], C**2 / 1000), job="growth/text_side/C", suite="growth", operator="text_side", C=C)
        for C in (2, 4, 8)
    ]
    return [
        *pairs,
        without_numbers(replace(pairs[0], provider="compiled"), FAILED, "gradient of V: 3 times what is allowed"),
        without_numbers(replace(pairs[0], provider="triton"), UNAVAILABLE, "needs a GPU"),
        without_numbers(operator_row("reference", 193), TOO_LARGE, "out of memory"),
        step,
        *growth,
    ]


@pytest.fixture
def write_results(tmp_path: Path) -> WriteResults:
    """Write rows, and an environment with some of its parts replaced, to a new folder of this name."""

    def write(name: str, rows: Sequence[Row], **environment: Any) -> Path:
        Results(tmp_path / name, {**ENVIRONMENT, **environment}).add(rows)
        return tmp_path / name

    return write


def operator_row(provider: str, C: int) -> Row:
    row = Row(
        job=f"operators/pair_loss/C{C}-B8-fp32",
        suite="operators",
        operator="pair_loss",
        provider=provider,
        C=C,
        B=8,
        n=16,
        peak_bytes=2**20,
        flops=10**6,
        bytes=10**5,
        roofline=0.5,
    )
    return timed(row, MILLISECONDS[provider] * C / 14)


def timed(row: Row, milliseconds: float) -> Row:
    p50 = milliseconds / 1000
    return replace(row, repeats=9, p20=0.9 * p50, p50=p50, p80=1.2 * p50)

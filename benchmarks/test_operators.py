"""The registry under pytest-benchmark: `python -m pytest benchmarks/test_operators.py -k "pair_loss and C14"`.

A round is forward and backward, the device's work included. A form that fails the gate fails its test and has no
numbers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from .harness import SLOW, Unavailable
from .machine import PeakMemory, describe_machine, versions
from .operators import PROVIDERS, OperatorJob, Run, jobs, worst_ratios
from .registry import Part, Problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@lru_cache(maxsize=1)
def known(job: OperatorJob) -> tuple[Problem, list[Part], Run]:
    """Inputs, what is known of the outcome, and the literal form after its first repetition."""
    problem, parts = job.parts(DEVICE)
    baseline = Run(job, "reference", [problem], parts, DEVICE)
    baseline.prepare()(0)
    return problem, parts, baseline


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("job", jobs(DEVICE.type), ids=lambda job: job.key)
def test_operator(benchmark: Any, job: OperatorJob, provider: str) -> None:
    problem, parts, baseline = known(job)
    run = Run(job, provider, [problem], parts, DEVICE)
    try:
        call = run.prepare()
    except Unavailable as error:
        pytest.skip(str(error))
    memory = PeakMemory(DEVICE)
    slowest = max(call(0).values())
    peak = memory.bytes()
    ratio = worst_ratios({"baseline": baseline, provider: run}, parts)[provider]
    assert ratio <= 1, f"error is {ratio:.3g} times what is allowed"
    benchmark.group = job.key
    benchmark.pedantic(call, args=(1,), rounds=3 if slowest > SLOW else 10)
    p20, p80 = np.percentile(benchmark.stats.stats.data, [20, 80])
    benchmark.extra_info.update(p20=float(p20), p80=float(p80), peak_bytes=peak, error=ratio)
    benchmark.extra_info.update(machine=describe_machine(DEVICE), versions=versions())

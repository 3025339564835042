"""The operators under pytest-benchmark: `python -m pytest benchmarks/test_operators.py -k "pair_loss and C14"`.

A round is forward and backward, the device's work included. An implementation that fails the gate fails its test and
has no numbers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from .harness import SLOW, Sizes, Unavailable
from .jobs import Job, registry, standard_jobs
from .machine import environment
from .operator_case import OperatorCase

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
JOBS = [job for job in standard_jobs(DEVICE.type) if job.key.startswith("operators/")]
CASES = [pytest.param(job, impl, id=f"{job.key}-{impl}") for job in JOBS for impl in job.impls]


@lru_cache(maxsize=1)
def case_of(key: str) -> OperatorCase:
    """The case of a job, after the first repetition of the literal equations."""
    (job,) = [job for job in JOBS if job.key == key]
    entry = registry()[0][job.op]
    shown = {letter: size for letter, (size,) in job.shape.items()}
    case = entry.make(Sizes({**entry.letters, **shown}), job.dtype, DEVICE)
    assert isinstance(case, OperatorCase)
    case.prepare("reference")(0)
    return case


@pytest.mark.parametrize(("job", "impl"), CASES)
def test_operator(benchmark: Any, job: Job, impl: str) -> None:
    case = case_of(job.key)
    try:
        call = case.prepare(impl)
    except Unavailable as error:
        pytest.skip(str(error))
    slowest = max(call(0).values())
    verdict = case.verdicts(["reference", impl])[impl]
    assert verdict.error <= 1, f"error is {verdict.error:.3g} times what is allowed; {verdict.detail}"
    benchmark.group = job.key
    benchmark.pedantic(call, args=(1,), rounds=3 if slowest > SLOW else 10)
    benchmark.extra_info.update(environment(DEVICE), error=verdict.error)

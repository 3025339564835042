"""Operators are measured behind a gate that a broken kernel does not pass."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from benchmarks.registry import OPERATORS, Problem, Shape, outcome
from torch import Tensor

from benchmarks import harness, registry
from benchmarks.gate import poisoned, ratios
from benchmarks.operators import DIRECTIONS, OperatorJob, jobs
from benchmarks.rows import FAILED, OK, TOO_LARGE, UNAVAILABLE
from pspg.kernels.spcl import PairSample, spcl

CPU = torch.device("cpu")
UNCOMPILED = {"compiled": "left out"}
"""the compiler takes longer than all tests here"""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow tower of one layer, and no more repetitions than must be."""
    monkeypatch.setattr(harness, "SECONDS", 0.0)
    monkeypatch.setattr(harness, "FEWEST", 2)
    for name, size in {"D": 8, "H": 16, "W": 16, "LAYERS": 1, "HEADS": 2}.items():
        monkeypatch.setattr(registry, name, size)


def run(job: OperatorJob) -> dict[tuple[str, str], Any]:
    return {(row.provider, row.direction): row for row in job.run(CPU, UNCOMPILED, lambda name: None)}


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_passes_its_gate(small: None, operator: str) -> None:
    rows = run(OperatorJob(operator, Shape(4, 3, 2), "fp32"))
    assert len(rows) == 5 * len(DIRECTIONS)
    for (provider, direction), row in rows.items():
        if provider in ("reference", "repaired", "eager"):
            assert row.status == OK, row
            assert 0 <= row.error <= 1
            assert 0 < row.p20 <= row.p50 <= row.p80
        else:
            assert row.status == (TOO_LARGE if provider == "compiled" else UNAVAILABLE)
            assert row.p50 is None
        assert row.direction == direction
    both, forward, backward = (rows["eager", direction] for direction in ("both", "forward", "backward"))
    assert both.bytes > 0
    assert both.flops > 0 or operator in ("asymmetric_loss", "add_norm")
    # The eager form of SPCL computes its gradients in its forward.
    assert (forward.flops is None) == (operator == "spcl")
    assert forward.flops is None or both.flops == forward.flops + backward.flops


@pytest.mark.parametrize("operator", ["prompt_decoder", "spcl", "asymmetric_loss"])
@pytest.mark.parametrize("wrong", ["value", "gradient"])
def test_a_broken_form_fails_and_shows_no_number(
    small: None, monkeypatch: pytest.MonkeyPatch, operator: str, wrong: str
) -> None:
    """Off by a thousandth: in the outputs, or in the gradients only."""
    right = OPERATORS[operator]

    def broken(problem: Problem) -> Tensor:
        out = right.forms["eager"](problem)
        assert isinstance(out, Tensor)
        return out * 1.001 if wrong == "value" else 1.001 * out - 0.001 * out.detach()

    monkeypatch.setitem(OPERATORS, operator, replace(right, forms={**right.forms, "eager": broken}))
    rows = run(OperatorJob(operator, Shape(4, 3, 2), "fp32"))
    for direction in DIRECTIONS:
        row = rows["eager", direction]
        assert row.status == FAILED
        assert row.error > 1
        assert row.p20 is row.p50 is row.p80 is row.peak_bytes is None
        assert rows["repaired", direction].status == OK


def test_what_is_known_of_a_part_is_true(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a budget for one class, and on one for everything, the literal form agrees with what is expected."""
    for name in ("spcl", "text_tower"):
        operator = OPERATORS[name]
        torch.manual_seed(0)
        exact = operator.make(Shape(6, 3, 2), CPU, torch.float32).to(torch.float64)
        literal = operator.forms["reference"]
        for budget, count in ((1, 2 if name == "spcl" else 1), (10**15, 1)):
            parts = operator.parts(literal, exact, exact, budget)
            assert len(parts) == count
            for part in parts:
                for got, right in zip(part.view(outcome(literal, part.problem)), part.expected, strict=True):
                    torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def test_a_pair_that_is_left_out_shows(small: None) -> None:
    """Also where only a sample of the classes is checked: each class has a pair with every other one."""
    operator = OPERATORS["spcl"]
    torch.manual_seed(0)
    problem = operator.make(Shape(6, 3, 2), CPU, torch.float32)
    parts = operator.parts(operator.forms["reference"], problem, problem.to(torch.float64), 1)

    def without_last_row(impl: str, problem: Problem) -> Tensor:
        tower, frame, labels, pairs = problem.fixed
        prompts, vectors, scale = problem.leaves
        first, second = torch.triu_indices(6, 6, offset=1) if pairs is None else pairs
        kept = first < 3
        sample = PairSample(first[kept], second[kept], torch.ones(int(kept.sum())))
        return spcl(tower, frame, prompts, vectors, scale, labels, sample=sample, impl=impl)

    right = [part.view(outcome(operator.forms["eager"], part.problem)) for part in parts]
    wrong = [part.view(outcome(partial(without_last_row, "eager"), part.problem)) for part in parts]
    found = [
        ratios({"right": a, "wrong": b}, part.expected, torch.float32)
        for a, b, part in zip(right, wrong, parts, strict=True)
    ]
    assert all(ratio["right"] <= 1 for ratio in found)
    assert max(ratio["wrong"] for ratio in found) > 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.index_fill(0, torch.tensor([3]), torch.nan),
        lambda t: t.index_fill(0, torch.tensor([3]), 0.0),
        lambda t: t[:-1],
        lambda t: t.flip(0),
    ],
)
def test_one_wrong_element_is_enough(spoil: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    exact = torch.randn(1000, dtype=torch.float64)
    honest = exact.float()
    assert ratios({"baseline": [honest], "same": [honest.clone()]}, [exact], torch.float32)["same"] <= 1
    assert ratios({"baseline": [honest], "spoilt": [spoil(honest)]}, [exact], torch.float32)["spoilt"] > 1
    assert ratios({"baseline": [spoil(honest)]}, [exact], torch.float32)["baseline"] > 1


def test_what_nobody_writes_is_nan() -> None:
    with poisoned():
        assert torch.empty(5).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_jobs_are_distinct_and_can_be_sent(device: str) -> None:
    found = jobs(device)
    assert len({job.key for job in found}) == len(found)
    assert pickle.loads(pickle.dumps(found)) == found
    assert {job.operator for job in found} == set(OPERATORS)

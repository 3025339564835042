"""Operators are measured behind a gate that a broken kernel does not pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench
from benchmarks.harness import Sizes
from benchmarks.operator_case import OperatorCase
from benchmarks.operators import OPERATORS
from benchmarks.problem import Problem, outcome
from benchmarks.rows import FAILED, OK, UNAVAILABLE, Row
from pspg.kernels.pairs import PairSample, PairSelection
from pspg.kernels.spcl import ImageBatch, spcl
from pspg.kernels.text_tower import Prompts

CPU = torch.device("cpu")
SMALL = {
    "C": 4,
    "B": 3,
    "n": 2,
    "D": 8,
    "H": 16,
    "W": 16,
    "layers": 2,
    "heads": 2,
    "channels": 5,
    "side": 4,
    "tokens": 5,
}
FORMS = ("reference", "repaired", "eager")


def run(operator: str, **options: Any) -> dict[tuple[str, str], Row]:
    shape = {letter: size for letter, size in SMALL.items() if letter in OPERATORS[operator].letters}
    return {(row.impl, row.direction): row for row in bench(operator, device="cpu", **shape, **options)}


def spoil(monkeypatch: pytest.MonkeyPatch, operator: str, function: Callable[[Problem], Any]) -> None:
    """Replace the eager implementation."""
    right = OPERATORS[operator]
    monkeypatch.setitem(OPERATORS, operator, replace(right, impls={**right.impls, "eager": function}))


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_passes_its_gate(quick: None, operator: str) -> None:
    rows = run(operator)
    assert len(rows) == 12
    for (impl, _), row in rows.items():
        if impl == "triton":
            assert (row.status, row.p50) == (UNAVAILABLE, None)
            continue
        assert row.status == OK, row
        assert row.error is not None
        assert 0 <= row.error <= 1
        assert row.p20 is not None
        assert row.p50 is not None
        assert 0 < row.p20 <= row.p50
    both, forward, backward = (rows["eager", direction] for direction in ("both", "forward", "backward"))
    assert both.bytes
    assert both.flops or operator in ("asymmetric_loss", "add_norm", "batch_norm", "gather")
    assert both.flops == (forward.flops or 0) + (backward.flops or 0)


@pytest.mark.parametrize("operator", ["prompt_decoder", "spcl", "asymmetric_loss"])
@pytest.mark.parametrize("wrong", ["value", "gradient"])
@pytest.mark.parametrize("asked", [FORMS, ("eager",)])
def test_a_broken_implementation_shows_no_number(
    quick: None, monkeypatch: pytest.MonkeyPatch, operator: str, wrong: str, asked: tuple[str, ...]
) -> None:
    """Off by a thousandth, in the outputs or in the gradients only; also where it is measured alone."""
    right = OPERATORS[operator].impls["eager"]

    def broken(problem: Problem) -> Tensor:
        out = right(problem)
        assert isinstance(out, Tensor)
        return out * 1.001 if wrong == "value" else 1.001 * out - 0.001 * out.detach()

    spoil(monkeypatch, operator, broken)
    rows = run(operator, impl=asked)
    for (impl, _), row in rows.items():
        assert row.status == (FAILED if impl == "eager" else OK)
        assert (row.p50 is None) == (impl == "eager")
    assert (rows["eager", "both"].error or 0) > 1


def test_bytes_are_those_of_what_is_read(quick: None) -> None:
    """Two inputs, weight and bias; two outputs; gradients of the inputs: no other weights of the tower."""
    row = run("add_norm", impl="eager")["eager", "both"]
    elements = 6 * 3 * 16  # pairs, tokens, width
    assert row.bytes == 4 * (2 * elements + 2 * 16 + 2 * elements + 2 * elements)


def exact_problem(name: str) -> tuple[Problem, Problem]:
    torch.manual_seed(0)
    problem = OPERATORS[name].make(Sizes({**SMALL, "C": 6}), CPU, torch.float32)
    return problem, problem.to(torch.float64)


@pytest.mark.parametrize(("name", "sampled"), [("spcl", 2), ("text_tower", 1)])
def test_what_is_known_of_a_part_is_true(name: str, sampled: int) -> None:
    """On a budget for one class, and on one for everything, the literal implementation gives what is expected."""
    operator, (_, exact) = OPERATORS[name], exact_problem(name)
    literal = operator.impls["reference"]
    for budget, count in ((1, sampled), (10**15, 1)):
        parts = operator.parts(literal, exact, exact, budget)
        assert len(parts) == count
        for part in parts:
            for got, right in zip(part.view(outcome(literal, part.problem)), part.expected, strict=True):
                torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def test_a_pair_that_is_left_out_shows(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only a sample of the classes is checked: each class has a pair with every other one."""

    def without_last_rows(problem: Problem) -> Tensor:
        tower, template, labels, pairs = problem.fixed
        first, second = torch.triu_indices(4, 4, offset=1) if pairs is None else pairs
        kept = first < 2
        sample = PairSample(first[kept], second[kept], torch.ones(int(kept.sum())))
        prompts, vectors, scale = problem.leaves
        images, chosen = ImageBatch(vectors, scale, labels), PairSelection(len(prompts), sample)
        return spcl(tower, Prompts(prompts, template), images, pairs=chosen, impl="eager")

    monkeypatch.setattr("benchmarks.operator_case.ORACLE_FLOPS", {"cpu": 1})
    assert run("spcl")["eager", "both"].status == OK
    spoil(monkeypatch, "spcl", without_last_rows)
    rows = run("spcl")
    assert (rows["eager", "both"].status, rows["repaired", "both"].status) == (FAILED, OK)


def test_repetitions_read_inputs_of_their_own() -> None:
    """Together twice the cache, so that none finds its inputs there."""
    case = OperatorCase(OPERATORS["pair_loss"], Sizes(C=14, B=3, D=1024), torch.float32, CPU)
    pointers = {problem.leaves[0].data_ptr() for problem in case.problems}
    assert len(pointers) == len(case.problems) > 2
    zeros = tuple(torch.zeros_like(leaf) for leaf in case.problem.leaves)
    case.problems = [case.problem, replace(case.problem, leaves=zeros)]
    seen: list[float] = []
    right = case.operator.impls["reference"]
    case.operator = replace(case.operator, impls={"eager": partial(_record, seen, right)})
    call = case.prepare("eager")
    call(1)
    call(2)
    assert seen[0] == 0 != seen[1]


def _record(seen: list[float], function: Callable[[Problem], Any], problem: Problem) -> Any:
    seen.append(float(problem.leaves[0].detach().abs().sum()))
    return function(problem)

"""Right and wrong results at the gate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.gate import excess, poisoned, ratios


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


def test_a_step_sees_small_parts_and_what_is_missing() -> None:
    large, small = torch.ones(1000), torch.full((3,), 1e-3)
    right = {"gradients": {"large": large, "small": small}}
    assert excess(right, right, torch.float32)[0] == 0
    assert excess({"gradients": {"large": large, "small": 1.01 * small}}, right, torch.float32)[1] == "gradients small"
    assert excess({"gradients": {"large": large}}, right, torch.float32)[0] == float("inf")
    nan = {"gradients": {"large": large * float("nan"), "small": small}}
    assert excess(nan, right, torch.float32)[0] == float("inf")
    allowed = torch.finfo(torch.float32).eps ** 0.5
    wrong = {"gradients": {"large": (1 + 2 * allowed) * large, "small": small}}
    assert excess(wrong, right, torch.float32)[0] == pytest.approx(2, rel=0.01)


def test_what_nobody_writes_is_nan() -> None:
    with poisoned():
        assert torch.empty(5).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()

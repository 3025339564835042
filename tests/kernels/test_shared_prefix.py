"""Sharing prefixes changes nothing: features and gradients of pair prompts against the literal way, float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from pspg.kernels.spcl import pair_features, spcl
from pspg.kernels.text_tower import Frame, TextTower


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("n", [1, 4])
def test_equals_the_reference(
    tower: TextTower, make_frame: Callable[..., Frame], layers: int, classes: int, n: int
) -> None:
    torch.manual_seed(layers)
    tower = replace(tower, layers=(tower.layers * 2)[:layers])
    frame = make_frame(classes)
    prompts = torch.randn(classes, n, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(classes * (classes - 1) // 2, 3, dtype=torch.float64)
    results = []
    for impl in ("reference", "eager"):
        features = pair_features(tower, frame, prompts, impl=impl)
        (gradient,) = torch.autograd.grad((features * weights).sum(), prompts)
        results.append((features.detach(), gradient))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_auto_takes_it_and_prefix_mode_does_not(tower: TextTower, make_frame: Callable[..., Frame]) -> None:
    torch.manual_seed(0)
    prompts = torch.randn(3, 2, 4, dtype=torch.float64)
    named = make_frame(3, [1, 3, 2])
    torch.testing.assert_close(
        pair_features(tower, named, prompts), pair_features(tower, named, prompts, impl="reference"), rtol=0, atol=0
    )
    with pytest.raises(ValueError, match="eager"):
        pair_features(tower, named, prompts, impl="eager")
    images, scale, labels = torch.randn(2, 3, dtype=torch.float64), torch.tensor(1.0), torch.ones(2, 3)
    eager, auto = (spcl(tower, make_frame(3), prompts, images, scale, labels, impl=impl) for impl in ("eager", "auto"))
    assert eager == auto

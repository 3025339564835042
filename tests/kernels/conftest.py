"""A tiny random text tower and frames."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pspg.kernels.text_tower import Frame, TextLayer, TextTower

W, D = 4, 3


def weight(*shape: int, around: float = 0.0) -> Tensor:
    return around + 0.3 * torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def tower() -> TextTower:
    """Two layers of two heads, W = 4, D = 3, 77 positions, float64."""
    torch.manual_seed(0)
    layers = tuple(
        TextLayer(
            *(weight(W, around=1), weight(W), weight(3 * W, W), weight(3 * W), weight(W, W), weight(W)),
            *(weight(W, around=1), weight(W), weight(8, W), weight(8), weight(W, 8), weight(W)),
        )
        for _ in range(2)
    )
    return TextTower(layers, weight(77, W), weight(W, around=1), weight(W), weight(W, D), heads=2)


@pytest.fixture
def make_frame() -> Callable[..., Frame]:
    """Function (classes, name lengths or None) → frame; None is the whole-prompt mode, whose suffix is EOS."""

    def make(classes: int, lengths: list[int] | None = None) -> Frame:
        torch.manual_seed(1)
        known = lengths or [0] * classes
        tail = max(known) + 2 if lengths else 1
        suffix = weight(classes, tail, W)
        return Frame(weight(W), weight(W), suffix, torch.tensor(known), tuple(known), max(known))

    return make

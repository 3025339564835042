"""A tiny random text tower, prompt templates, and where kernels run."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from pspg.kernels.text_tower import PromptTemplate, TextLayer, TextTower

W, D = 4, 3


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> None:
    """Repair and guard Triton's interpreter where kernels run in it."""
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
        from tests.kernels.interpreter import repair

        repair()


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
def make_template() -> Callable[..., PromptTemplate]:
    """Function (classes, name lengths or None) → template; None is the whole-prompt mode, whose suffix is EOS."""

    def make(classes: int, lengths: list[int] | None = None) -> PromptTemplate:
        torch.manual_seed(1)
        known = lengths or [0] * classes
        suffix = weight(classes, max(known) + 2 if lengths else 1, W)
        return PromptTemplate(weight(W), weight(W), suffix, torch.tensor(known), tuple(known), max(known))

    return make


@pytest.fixture
def device() -> torch.device:
    """Device that kernels run on: a GPU, or else Triton's interpreter."""
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return torch.device("cuda")
    return torch.device("cpu")

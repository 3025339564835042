"""A tiny random text tower and templates, and what a kernel is held to."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from pspg.kernels.text_tower import PromptTemplate, TextLayer, TextTower

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
def make_template() -> Callable[..., PromptTemplate]:
    """Function (classes, name lengths or None) → template; None is the whole-prompt mode, whose suffix is EOS."""

    def make(classes: int, lengths: list[int] | None = None) -> PromptTemplate:
        torch.manual_seed(1)
        known = lengths or [0] * classes
        tail = max(known) + 2 if lengths else 1
        suffix = weight(classes, tail, W)
        return PromptTemplate(weight(W), weight(W), suffix, torch.tensor(known), tuple(known), max(known))

    return make


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: a GPU, or else Triton's interpreter."""
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return torch.device("cuda")
    return torch.device("cpu")


@pytest.fixture
def no_worse() -> Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], None]:
    """Function (of the kernel, of torch in the same dtype, exact) that holds every element to torch's error.

    A little is allowed on top: an element may be off by twice the worst error that torch makes in its tensor, and by
    four roundings of the tensor's dtype.
    """

    def check(kernel: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
        for number, (got, other, right) in enumerate(zip(kernel, eager, exact, strict=True)):
            assert got.dtype == other.dtype
            assert got.shape == right.shape
            right = right.double().to(got.device)
            error, allowed = (got.double() - right).abs(), (other.double() - right).abs().max()
            rounding = torch.finfo(got.dtype).eps * right.abs().max()
            assert torch.isfinite(got).all(), f"tensor {number}"
            assert error.max() <= 2 * allowed + 4 * rounding, f"tensor {number}: {error.max()} against {allowed}"

    return check

"""The criterion for kernels accepts other roundings and refuses a single wrong element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.oracle import no_worse, no_worse_in_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def products(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The same matrix product summed in another order, by torch, and exactly; rows of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(32, 64, generator=generator), torch.randn(64, 48, generator=generator)
    a, b = (10.0 ** torch.arange(-3, 1).repeat(8)[:, None] * a).to(dtype), b.to(dtype)
    parts = [a[:, part].float() @ b[part].float() for part in (slice(0, 24), slice(24, 64))]
    return sum(parts).to(dtype), a @ b, a.double() @ b.double()  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_order_of_summation_passes(dtype: torch.dtype) -> None:
    kernel, eager, exact = products(dtype)
    no_worse([kernel, kernel.sum()[None]], [eager, eager.sum()[None]], [exact, exact.sum()[None]])
    no_worse([exact.to(dtype)], [eager], [exact])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_element_does_not(dtype: torch.dtype) -> None:
    """The largest by 12 roundings, and one of a row a thousand times smaller by a third."""
    kernel, eager, exact = products(dtype)
    largest, small = int(exact.abs().argmax()), int(exact[0].abs().argmax())
    for place, factor in ((largest, 1 - 12 * torch.finfo(dtype).eps), (small, 2 / 3)):
        wrong = kernel.clone()
        wrong.view(-1)[place] *= factor
        with pytest.raises(AssertionError, match=r"tensor 0: 1 of 1536 elements"):
            no_worse([wrong], [eager], [exact])


def test_a_bad_element_of_torch_excuses_no_other() -> None:
    exact = torch.linspace(1, 2, 10_000, dtype=torch.float64)
    eager = exact.float()
    eager[0] += 1e-3
    kernel = exact.float()
    kernel[0] += 1e-3
    no_worse([kernel], [eager], [exact])
    kernel[1] += 1e-3
    with pytest.raises(AssertionError, match=r"the worst, \(1,\)"):
        no_worse([kernel], [eager], [exact])


def test_what_cannot_be_compared_is_refused() -> None:
    right = torch.ones(3, dtype=torch.float64)
    good = right.float()
    for got in (good.bfloat16(), good[:2], good / 0, good * torch.nan):
        with pytest.raises(AssertionError, match="tensor 0"):
            no_worse([got], [good], [right])
    empty = good[:0]
    no_worse([empty], [empty], [right[:0]])


def test_in_norm_an_error_three_times_as_large_is_refused() -> None:
    exact = torch.ones(8, dtype=torch.float64)
    eager, kernel = (exact + 1e-3).float(), (exact + 3e-3).float()
    no_worse_in_norm([kernel], [eager], [exact], slack=1.1e-3)
    with pytest.raises(AssertionError, match=r"tensor 0: off by 0\.00849, eager by 0\.00283"):
        no_worse_in_norm([kernel], [eager], [exact], slack=0.9e-3)
    with pytest.raises(AssertionError, match=r"float64 against torch\.float32"):
        no_worse_in_norm([exact], [eager], [exact], slack=1)

"""The kernels of batch norm with residual and ReLU against float64, with all gradients, and as torch operators."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from pspg.kernels.batch_norm import Norm, batch_norm, batch_norm_twice
from pspg.kernels.launch import replaced
from tests.oracle import no_worse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 1, 1, 1), (3, 5, 2, 3), (5, 33, 3, 7)]


def small_tiles() -> AbstractContextManager[object]:
    """Tiles so small that few rows are several programs' and loops turn."""
    small = {"BLOCK": 64, "COLUMNS": 8}
    return replaced(batch_norm_moments=small, batch_norm_gradient_sums=small, batch_norm_pass=small)


def norm_of(weight: Tensor, bias: Tensor) -> Norm:
    generator = torch.Generator().manual_seed(5)
    mean, variance = (torch.rand(len(bias), generator=generator).to(bias) for _ in range(2))
    return Norm(weight, bias, mean.detach(), variance.detach() + 0.5, torch.tensor(3, device=bias.device))


def inputs(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, *, mean: float = 0.0) -> list[Tensor]:
    """x, residual, weight, bias; the last two in float32."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(2))
    apart = mean * torch.randn(shape[1], generator=generator)[:, None, None]
    low = [tensor.to(device, dtype, memory_format=torch.channels_last) for tensor in (x + apart, residual)]
    return [*low, weight.to(device), bias.to(device)]


def outcome(
    given: list[Tensor], dtype: torch.dtype | None = None, *, added: bool = True, **options: Any
) -> list[Tensor]:
    """Result, gradients of all inputs under fixed random weights, running statistics; in `dtype`, or as given."""
    given = given if added else [given[0], *given[2:]]
    leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in given]
    norm = norm_of(*leaves[-2:])
    y = batch_norm(leaves[0], norm, leaves[1] if added else None, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.device, given[0].dtype).to(y.dtype)
    gradients = torch.autograd.grad(y, leaves, weights)
    assert norm.num_batches_tracked == 4
    return [y.detach(), *gradients, norm.running_mean, norm.running_var]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("added", "relu"), [(False, True), (True, True), (False, False), (True, False)])
def test_kernels(shape: tuple[int, ...], added: bool, relu: bool, dtype: torch.dtype, device: torch.device) -> None:
    given = inputs(shape, device, dtype)
    with small_tiles():
        kernel = outcome(given, added=added, relu=relu, impl="triton")
    eager = outcome(given, added=added, relu=relu, impl="eager")
    exact = outcome(given, torch.float64, added=added, relu=relu, impl="reference")
    no_worse(kernel, eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_far_from_zero(dtype: torch.dtype, device: torch.device) -> None:
    """A thousand deviations in float32, where a sum of squares would leave nothing of the variance."""
    given = inputs((4, 12, 5, 6), device, dtype, mean=1e3 if dtype == torch.float32 else 30.0)
    with small_tiles():
        kernel = outcome(given, relu=False, impl="triton")
    eager, exact = (outcome(given, kind, relu=False, impl="reference") for kind in (None, torch.float64))
    no_worse(kernel, eager, exact)


def test_the_tiles_of_production(device: torch.device) -> None:
    """More rows than the programs of one channel have tiles, and an outlier in the first."""
    given = inputs((2, 40, 30, 31), device, torch.float32)
    given[0][0, :, 0, 0] = 300.0
    kernel = outcome(given, impl="triton")
    eager, exact = outcome(given, impl="eager"), outcome(given, torch.float64, impl="reference")
    no_worse(kernel, eager, exact)


def test_the_same_bits_every_time_and_in_any_memory_format(device: torch.device) -> None:
    given = inputs((3, 20, 5, 4), device, torch.bfloat16)
    with small_tiles():
        first, again = (outcome(given, impl="triton") for _ in range(2))
        rows = outcome([given[0].contiguous(), given[1].contiguous(), *given[2:]], impl="triton")
    for one, two, three in zip(first, again, rows, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    assert first[0].is_contiguous(memory_format=torch.channels_last)


def test_what_is_not_a_number_stays_none(device: torch.device) -> None:
    given = inputs((2, 4, 2, 2), device, torch.float32)
    given[0][0, 1, 0, 0] = torch.nan
    y = batch_norm(given[0], norm_of(*given[2:]), impl="triton")
    assert y[:, 1].isnan().all()
    assert not y[:, [0, 2, 3]].isnan().any()


def test_backward_keeps_what_it_cannot_make_again(device: torch.device) -> None:
    """x and two numbers a channel; the result where a residual was added to it before the ReLU."""
    given = [tensor.requires_grad_() for tensor in inputs((3, 8, 4, 4), device, torch.float32)]
    for residual, count in ((None, 1), (given[1], 2)):
        kept: list[Tensor] = []

        def keep(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            batch_norm(given[0], norm_of(*given[2:]), residual, impl="triton")
        assert sum(tensor.numel() for tensor in kept) == count * given[0].numel() + 4 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("readers", [(0, 1), (1,), ()])
def test_two_readers(readers: tuple[int, ...], added: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Gradients of both add up, also where one or both of them have none."""
    given = inputs((3, 18, 3, 4), device, dtype)

    def run(impl: str, kind: torch.dtype | None = None) -> list[Tensor]:
        leaves = [tensor.detach().to(kind or tensor.dtype).requires_grad_() for tensor in given]
        x, residual, weight, bias = leaves
        results = batch_norm_twice(x, norm_of(weight, bias), residual if added else None, impl=impl)
        assert results[0].data_ptr() == results[1].data_ptr()
        generator = torch.Generator().manual_seed(3)
        weights = [torch.randn(x.shape, generator=generator).to(device, dtype).to(x.dtype) for _ in range(2)]
        total = sum(((results[number] * weights[number]).sum() for number in readers), 0 * leaves[0].sum())
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        return [results[0].detach(), *(gradient for gradient in gradients if gradient is not None)]

    with small_tiles():
        kernel = run("triton")
    no_worse(kernel, run("eager"), run("reference", torch.float64))


def test_they_are_proper_operators(device: torch.device) -> None:
    from pspg.kernels.batch_norm.triton import operators

    x, residual, weight, bias = inputs((2, 4, 3, 3), device, torch.float32)
    torch.library.opcheck(operators._statistics, (x, *norm_of(weight, bias)[2:]))
    statistics = operators._statistics(x, *norm_of(weight, bias)[2:])
    for added in (None, residual):
        torch.library.opcheck(operators._normalise, (x, added, weight, bias, statistics, True))
    for again, y in ((None, None), (x, residual)):
        torch.library.opcheck(operators._gradients, (x, again, x, y, weight, bias, statistics, True))


def test_float64_has_no_kernels() -> None:
    x = torch.randn(2, 4, 3, 3).double()
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        batch_norm(x, norm_of(torch.ones(4), torch.zeros(4)), impl="triton")

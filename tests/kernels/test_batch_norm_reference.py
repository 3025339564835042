"""Batch norm with residual and ReLU: the literal equations and torch's operators against torch's modules."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pspg.kernels.batch_norm import Norm, batch_norm


def norm_of(weight: Tensor, bias: Tensor) -> Norm:
    return Norm(weight, bias, torch.zeros_like(bias), torch.ones_like(bias), torch.tensor(0))


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("added", [False, True])
def test_it_is_what_the_modules_of_a_resnet_compute(impl: str, added: bool) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, momentum=0.2, eps=1e-3).double()
    nn.init.normal_(norm.weight)
    other = deepcopy(norm)
    x, residual = (torch.randn(4, 6, 3, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    for _ in range(2):
        y = norm(x)
        expected = torch.relu(y + residual if added else y)
        own = Norm(*(getattr(other, name) for name in Norm._fields))
        found = batch_norm(x, own, residual if added else None, impl=impl)
    tolerance = {"rtol": 0, "atol": 0} if impl == "eager" else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(found, expected, **tolerance)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(dict(other.named_buffers())[name], buffer, **tolerance)
    leaves = [x, residual] if added else [x]
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad(found, [*leaves, other.weight, other.bias], weights)
    theirs = torch.autograd.grad(expected, [*leaves, norm.weight, norm.bias], weights)
    for one, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, right, **tolerance)


def test_gradients_of_the_reference() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(2, 3, 2, 2, dtype=torch.float64), *(torch.randn(3, dtype=torch.float64) for _ in range(2))]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm(x, norm_of(weight, bias), 0.5 * x, relu=False, impl="reference")

    torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x, norm: {"norm": norm._replace(weight=x.new_ones(3))},
            r"weight must be \(C\), got \(3,\)",
        ),
        (lambda x, norm: {"residual": x[:1]}, "batch_norm: residual must be"),
        (lambda x, norm: {"residual": x.double()}, "batch_norm: residual must be torch.float32 as x is"),
        (lambda x, norm: {"norm": norm._replace(running_mean=x.new_ones(1))}, "batch_norm: running_mean must be"),
        (lambda x, norm: {"x": x[:1, :, :1, :1]}, "needs more than one number a channel"),
        (lambda x, norm: {"impl": "fast"}, "impl='fast' is not available"),
    ],
)
def test_what_does_not_fit_is_one_line(change: Callable[..., dict[str, Any]], message: str) -> None:
    x, norm = torch.randn(2, 4, 3, 3), norm_of(torch.ones(4), torch.zeros(4))
    with pytest.raises(ValueError, match=message):
        batch_norm(**{"x": x, "norm": norm, **change(x, norm)})

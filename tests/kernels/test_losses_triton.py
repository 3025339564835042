"""The kernels of the asymmetric and the pair loss against float64, with all gradients, and as torch operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pspg.kernels.asymmetric_loss import asymmetric_loss
from pspg.kernels.pair_loss import pair_loss
from pspg.kernels.pairs import pair_indices
from tests.oracle import no_worse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_labels(kind: str, images: int, classes: int, device: torch.device) -> Tensor:
    torch.manual_seed(1)
    mixed = torch.randint(-1, 2, (images, classes))
    return {"mixed": mixed, "none": -torch.ones_like(mixed), "negative": 0 * mixed, "positive": 0 * mixed + 1}[kind].to(
        device
    )


def outcome(function: Callable[..., Tensor], tensors: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    loss = function(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("labels", ["mixed", "none", "negative", "positive"])
@pytest.mark.parametrize(("images", "classes"), [(1, 1), (7, 5), (64, 14)])
def test_asymmetric_loss(images: int, classes: int, labels: str, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    logits = (6 * torch.randn(images, 2, classes, device=device)).to(dtype)
    y = make_labels(labels, images, classes, device)
    for options in ({"reduction": "mean"}, {"gamma_positive": 0.0, "gamma_negative": 4.0, "clip": 0.0}):

        def loss(x: Tensor, impl: str, options: dict[str, Any] = options) -> Tensor:
            return asymmetric_loss(x, y, impl=impl, **options)

        kernel, eager = (outcome(loss, [logits], impl=impl) for impl in ("triton", "reference"))
        no_worse(kernel, eager, outcome(loss, [logits.double()], impl="reference"))


def test_asymmetric_loss_of_extreme_logits(device: torch.device) -> None:
    """Saturated probabilities: floored logarithms and shifts that reach 1 pass no gradient, and nothing is infinite.

    Without focusing (γ⁻ = 0) no factor hides the gradient of a shift that reaches 1.
    """
    z = torch.tensor([-1e4, -200.0, -20.0, -3.0, 0.0, 3.0, 20.0, 200.0, 1e4], device=device)
    logits = torch.stack([z, torch.zeros_like(z)])[None].expand(2, -1, -1).contiguous()
    y = torch.stack([torch.ones_like(z), torch.zeros_like(z)])
    for gamma in (2.0, 0.0):

        def loss(x: Tensor, impl: str, gamma: float = gamma) -> Tensor:
            return asymmetric_loss(x, y, gamma_negative=gamma, impl=impl)

        kernel, eager = (outcome(loss, [logits], impl=impl) for impl in ("triton", "reference"))
        no_worse(kernel, eager, outcome(loss, [logits.double()], impl="reference"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("images", "classes", "width", "labels"),
    [(1, 2, 16, "mixed"), (7, 5, 40, "mixed"), (7, 14, 33, "negative"), (64, 5, 70, "positive"), (70, 8, 24, "mixed")],
)
def test_pair_loss(
    images: int,
    classes: int,
    width: int,
    labels: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    torch.manual_seed(0)
    count = classes * (classes - 1) // 2
    features = torch.randn(count, width, device=device).to(dtype)
    vectors, scale = torch.randn(images, width, device=device), torch.tensor(0.7, device=device)
    y = make_labels(labels, images, classes, device).float()
    y[:, 0] = 0  # some pairs never occur
    present = torch.arange(images, device=device) % 3 == (images - 1) % 3  # the last always is
    for options in ({"reduction": "mean"}, {"weights": torch.rand(count, device=device)}, {"present": present}):

        def loss(*tensors: Tensor, impl: str, options: dict[str, Any] = options) -> Tensor:
            return pair_loss(*tensors, y, impl=impl, **options)

        given = [features, vectors, scale]
        kernel, eager = (outcome(loss, given, impl=impl) for impl in ("triton", "reference"))
        no_worse(kernel, eager, outcome(loss, [t.double() for t in given], impl="reference"))


def test_pair_loss_at_the_temperature_of_trained_models(device: torch.device) -> None:
    """Logits of ±700: float32 throughout."""
    torch.manual_seed(0)
    features = torch.randn(10, 48, device=device)
    vectors = 50 * torch.nn.functional.normalize(features[:6] + 0.1 * torch.randn(6, 48, device=device), dim=1)
    given, y = [features, vectors, torch.tensor(2.66, device=device)], make_labels("mixed", 6, 5, device)
    kernel, eager = (
        outcome(lambda *t, impl: pair_loss(*t, y, impl=impl), given, impl=impl) for impl in ("triton", "reference")
    )
    no_worse(kernel, eager, outcome(lambda *t: pair_loss(*t, y, impl="reference"), [t.double() for t in given]))


def test_pair_loss_of_more_pairs_than_one_program_sums(device: torch.device) -> None:
    torch.manual_seed(0)
    first, second = (part[:300] for part in pair_indices(26, device))
    given = [torch.randn(300, 16, device=device), torch.randn(3, 16, device=device), torch.tensor(0.5, device=device)]
    y = make_labels("mixed", 3, 26, device)

    def loss(*tensors: Tensor, impl: str) -> Tensor:
        return pair_loss(*tensors, y, pairs=(first, second), impl=impl)

    kernel, eager = (outcome(loss, given, impl=impl) for impl in ("triton", "reference"))
    no_worse(kernel, eager, outcome(loss, [t.double() for t in given], impl="reference"))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs(device: torch.device, wanted: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    given = [torch.randn(6, 16, device=device), torch.randn(3, 16, device=device), torch.tensor(0.5, device=device)]
    y = make_labels("mixed", 3, 4, device)
    every = outcome(lambda *t: pair_loss(*t, y, impl="triton"), given)
    leaves = [tensor.clone().requires_grad_(number in wanted) for number, tensor in enumerate(given)]
    some = torch.autograd.grad(3 * pair_loss(*leaves, y, impl="triton"), [leaves[number] for number in wanted])
    for got, number in zip(some, wanted, strict=True):
        assert torch.equal(got, every[1 + number])


def test_they_are_proper_operators(device: torch.device) -> None:
    from pspg.kernels.asymmetric_loss import triton as asymmetric
    from pspg.kernels.pair_loss import triton as pair

    logits = torch.randn(3, 2, 4, device=device, requires_grad=True)
    y = make_labels("mixed", 3, 4, device)
    torch.library.opcheck(asymmetric._asymmetric_loss, (logits, y, 1.0, 2.0, 0.05, 1e-6))
    features, vectors = (torch.randn(rows, 16, device=device, requires_grad=True) for rows in (6, 3))
    scale = torch.tensor(0.5, device=device, requires_grad=True)
    for weights in (None, torch.rand(6, device=device)):
        given = (features, vectors, scale, y, *pair_indices(4, device), weights, 0.5)
        torch.library.opcheck(pair._pair_loss, given)


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    features, y = torch.randn(1, 4), torch.ones(3, 2)
    with pytest.raises(ValueError, match="impl='triton' is not available"):
        pair_loss(features, torch.randn(3, 4), torch.tensor(1.0), y, target="sample", impl="triton")
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        asymmetric_loss(torch.randn(3, 2, 2, dtype=torch.float64), y, impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="CUDA device"):
        asymmetric_loss(torch.randn(3, 2, 2), y, impl="triton")

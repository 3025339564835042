from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from pspg.kernels.pair_loss import pair_loss

both_targets = pytest.mark.parametrize("target", ["batch", "sample"])


def inputs(classes: int = 4, images: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    pairs = classes * (classes - 1) // 2
    labels = torch.randint(-1, 2, (images, classes)).double()
    return (
        torch.randn(pairs, 5).double().requires_grad_(),
        torch.randn(images, 5).double().requires_grad_(),
        torch.tensor(0.7).double().requires_grad_(),
        labels,
    )


def literal(features: Tensor, images: Tensor, scale: Tensor, labels: Tensor, target: str, reduction: str) -> float:
    """Paper eqs. 5 to 8, one number at a time."""
    terms = []
    features, images, scale = (tensor.detach() for tensor in (features, images, scale))
    for feature, (i, j) in zip(features, combinations(range(labels.shape[1]), 2), strict=True):
        p = [1 / (1 + math.exp(-float(scale.exp() * image @ feature / feature.norm()))) for image in images]
        q = [float(row[i] == 1 and row[j] == 1) for row in labels]
        cases = [(max(p), max(q))] if target == "batch" else list(zip(p, q, strict=True))
        terms += [-(y * math.log(x) + (1 - y) * math.log(1 - x)) for x, y in cases]
    return sum(terms) if reduction == "sum" else sum(terms) / len(terms)


@both_targets
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_equals_the_equations(target: Any, reduction: Any) -> None:
    arguments = inputs()
    loss = pair_loss(*arguments, target=target, reduction=reduction)
    assert loss.item() == pytest.approx(literal(*arguments, target, reduction), rel=1e-12)


@both_targets
def test_gradcheck(target: Any) -> None:
    *tensors, labels = inputs(classes=3)
    assert torch.autograd.gradcheck(lambda *x: pair_loss(*x, labels, target=target), tensors)


@both_targets
def test_uncertain_labels_count_as_absent(target: Any) -> None:
    *tensors, labels = inputs()
    assert (labels == -1).any()
    assert torch.equal(
        pair_loss(*tensors, labels, target=target), pair_loss(*tensors, labels.clamp(min=0), target=target)
    )


def test_of_equal_maxima_one_image_takes_the_gradient() -> None:
    images = torch.ones(3, 1, requires_grad=True)
    pair_loss(torch.ones(1, 1), images, torch.tensor(0.0), torch.zeros(3, 2)).backward()
    assert images.grad is not None
    assert sorted(images.grad.flatten().tolist()) == pytest.approx([0, 0, 1 / (1 + math.exp(-1))])


@both_targets
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_one_label_value_and_saturated_logits_stay_finite(target: Any, value: float) -> None:
    features, images, _, labels = inputs()
    scale = torch.tensor(math.log(1 / 0.07)).requires_grad_()
    images = (50 * torch.nn.functional.normalize(images.detach(), dim=-1)).float().requires_grad_()
    loss = pair_loss(features.float(), images, scale, torch.full_like(labels, value), target=target)
    loss.backward()
    for tensor in (loss, images.grad, scale.grad):
        assert tensor is not None
        assert tensor.isfinite().all()


@both_targets
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_without_pairs_the_loss_is_zero_with_zero_gradients(target: Any, reduction: Any) -> None:
    *tensors, labels = inputs(classes=1)
    loss = pair_loss(*tensors, labels, target=target, reduction=reduction)
    loss.backward()
    assert loss.item() == 0
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in tensors)


def test_short_types_compute_in_float32_under_autocast() -> None:
    features, images, scale, labels = inputs()
    short = [tensor.detach().bfloat16() for tensor in (features, images)]
    expected = pair_loss(*(tensor.float() for tensor in short), scale.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = pair_loss(*short, scale.float(), labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


def test_refuses_what_does_not_fit() -> None:
    features, images, scale, labels = inputs()
    with pytest.raises(ValueError, match="4 classes have 6 pairs, got 5"):
        pair_loss(features[1:], images, scale, labels)
    with pytest.raises(ValueError, match="median"):
        pair_loss(features, images, scale, labels, reduction="median")  # type: ignore[arg-type]


@both_targets
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_images_that_do_not_count_are_as_if_they_were_not_there(target: Any, reduction: Any, weighted: bool) -> None:
    *tensors, labels = inputs(images=5)
    features, vectors, scale = tensors
    present = torch.tensor([False, True, True, False, True])
    weights = torch.linspace(0.5, 2, len(features)) if weighted else None
    options: dict[str, Any] = {"target": target, "reduction": reduction, "weights": weights}
    expected = pair_loss(features, vectors[present], scale, labels[present], **options)
    got = pair_loss(features, vectors, scale, labels, present=present, **options)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
    for one, other in zip(*(torch.autograd.grad(loss, tensors) for loss in (got, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pspg.kernels.asymmetric_loss import asymmetric_loss


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.tensor([[1, 0, -1, 1], [0, -1, 1, 0], [-1, 1, 0, 0]])
    return (2 * torch.randn(3, 2, 4)).double().requires_grad_(), labels


def literal(logits: Tensor, labels: Tensor, gammas: tuple[float, float], clip: float) -> list[float]:
    """−(1 − p_t)^γ log p_t, one number at a time."""
    terms, logits = [], logits.detach()
    for b, c in (labels >= 0).nonzero().tolist():
        p = 1 / (1 + math.exp(float(logits[b, 1, c] - logits[b, 0, c])))
        true, gamma = (p, gammas[0]) if labels[b, c] == 1 else (min(1.0, 1 - p + clip), gammas[1])
        terms.append(-((1 - true) ** gamma) * math.log(max(true, 1e-6)))
    return terms


@pytest.mark.parametrize("gammas", [(1.0, 2.0), (1.0, 4.0), (0.0, 0.0)])
def test_equals_the_equation(gammas: tuple[float, float]) -> None:
    logits, labels = inputs()
    terms = literal(logits, labels, gammas, 0.05)
    options = {"gamma_positive": gammas[0], "gamma_negative": gammas[1]}
    assert asymmetric_loss(logits, labels, **options).item() == pytest.approx(sum(terms), rel=1e-12)  # type: ignore[arg-type]
    mean = asymmetric_loss(logits, labels, **options, reduction="mean")  # type: ignore[arg-type]
    assert mean.item() == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_gradcheck_without_focus() -> None:
    """With γ = 0 the focusing factor, which is taken as constant, is 1."""
    logits, labels = inputs()
    assert torch.autograd.gradcheck(lambda x: asymmetric_loss(x, labels, gamma_positive=0, gamma_negative=0), logits)


def test_the_focusing_factor_is_constant() -> None:
    logits, labels = inputs()
    (gradient,) = torch.autograd.grad(asymmetric_loss(logits, labels, clip=0), logits)
    p = logits.softmax(dim=1)[:, 0]
    true = torch.where(labels == 1, p, 1 - p)
    focus = ((1 - true) ** torch.where(labels == 1, 1, 2)).detach()
    plain = (-focus * true.log())[labels >= 0].sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, logits)[0], rtol=1e-9, atol=1e-12)


def test_uncertain_labels_leave_no_trace() -> None:
    logits, labels = inputs()
    (gradient,) = torch.autograd.grad(asymmetric_loss(logits, labels, clip=0), logits)
    masked = (labels == -1)[:, None].expand_as(gradient)
    assert not gradient[masked].any()
    assert gradient[~masked].all()


@pytest.mark.parametrize("value", [0, 1, -1])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_one_label_value_and_saturated_logits_stay_finite(value: int, reduction: Any) -> None:
    logits = torch.tensor([[[700.0, -700.0, 0.0], [-700.0, 700.0, 0.0]]]).requires_grad_()
    loss = asymmetric_loss(logits, torch.full((1, 3), value), reduction=reduction)
    loss.backward()
    assert logits.grad is not None
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    if value == -1:
        assert loss.item() == 0


def test_short_types_compute_in_float32_under_autocast() -> None:
    logits, labels = inputs()
    short = logits.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = asymmetric_loss(short, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, asymmetric_loss(short.float(), labels))

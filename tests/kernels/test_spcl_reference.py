from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pspg.kernels.pair_loss import pair_loss
from pspg.kernels.pairs import PairSelection
from pspg.kernels.spcl import pair_features
from pspg.kernels.text_tower import Prompts, PromptTemplate, TextTower, encode
from tests.kernels.plain_spcl import loss_of

MakeTemplate = Callable[..., PromptTemplate]


def inputs(classes: int) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(2)
    shapes = [(classes, 2, 4), (2, 3), ()]
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes], torch.ones(2, classes)


def test_composes_one_sequence_a_pair(tower: TextTower, make_template: MakeTemplate) -> None:
    """Each pair alone, concatenated by hand, gives the same features, in row-major order."""
    (prompts, images, scale), labels = inputs(4)
    template = make_template(4)
    rows = [
        torch.cat([template.sos[None], prompts[i], prompts[j], template.token_suffix[j]])
        for i in range(4)
        for j in range(i + 1, 4)
    ]
    features = torch.cat([encode(tower, row[None], 5) for row in rows])
    torch.testing.assert_close(
        pair_features(tower, Prompts(prompts, template), impl="reference"), features, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        loss_of(tower, template, prompts, images, scale, labels), pair_loss(features, images, scale, labels)
    )


@pytest.mark.parametrize("lengths", [None, [1, 3, 2]], ids=["whole", "prefix"])
@pytest.mark.parametrize("target", ["batch", "sample"])
def test_gradcheck(tower: TextTower, make_template: MakeTemplate, lengths: list[int] | None, target: Any) -> None:
    tensors, labels = inputs(3)
    labels[0, 1] = -1
    labels[1, 2] = 0
    template = make_template(3, lengths)
    assert torch.autograd.gradcheck(
        lambda *x: loss_of(tower, template, *x, labels, target=target, impl="reference"), tensors
    )


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_one_class_has_no_pairs(tower: TextTower, make_template: MakeTemplate, reduction: Any) -> None:
    tensors, labels = inputs(1)
    loss = loss_of(tower, make_template(1), *tensors, labels, reduction=reduction)
    loss.backward()
    assert loss.item() == 0
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in tensors)


def test_refuses_what_does_not_fit(tower: TextTower, make_template: MakeTemplate) -> None:
    tensors, labels = inputs(3)
    with pytest.raises(ValueError, match="labels"):
        loss_of(tower, make_template(3), *tensors, labels[:, :2])
    with pytest.raises(ValueError, match="suffix"):
        loss_of(tower, make_template(2), *tensors, labels)
    with pytest.raises(ValueError, match="pairs of 4 classes, the prompts are of 3"):
        loss_of(tower, make_template(3), *tensors, labels, pairs=PairSelection(4))

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pspg.kernels.pair_loss import pair_loss
from pspg.kernels.spcl import pair_features, spcl
from pspg.kernels.text_tower import Frame, TextTower, encode

MakeFrame = Callable[..., Frame]


def inputs(classes: int) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(2)
    shapes = [(classes, 2, 4), (2, 3), ()]
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes], torch.ones(2, classes)


def test_composes_one_sequence_a_pair(tower: TextTower, make_frame: MakeFrame) -> None:
    """Each pair alone, concatenated by hand, gives the same features, in row-major order."""
    (prompts, images, scale), labels = inputs(4)
    frame = make_frame(4)
    rows = [
        torch.cat([frame.sos[None], prompts[i], prompts[j], frame.suffix[j]]) for i in range(4) for j in range(i + 1, 4)
    ]
    features = torch.cat([encode(tower, row[None], 5) for row in rows])
    torch.testing.assert_close(pair_features(tower, frame, prompts, impl="reference"), features, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        spcl(tower, frame, prompts, images, scale, labels), pair_loss(features, images, scale, labels)
    )


@pytest.mark.parametrize("lengths", [None, [1, 3, 2]], ids=["whole", "prefix"])
@pytest.mark.parametrize("target", ["batch", "sample"])
def test_gradcheck(tower: TextTower, make_frame: MakeFrame, lengths: list[int] | None, target: Any) -> None:
    tensors, labels = inputs(3)
    labels[0, 1] = -1
    labels[1, 2] = 0
    frame = make_frame(3, lengths)
    assert torch.autograd.gradcheck(lambda *x: spcl(tower, frame, *x, labels, target=target, impl="reference"), tensors)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_one_class_has_no_pairs(tower: TextTower, make_frame: MakeFrame, reduction: Any) -> None:
    tensors, labels = inputs(1)
    loss = spcl(tower, make_frame(1), *tensors, labels, reduction=reduction)
    loss.backward()
    assert loss.item() == 0
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in tensors)


def test_refuses_what_does_not_fit(tower: TextTower, make_frame: MakeFrame) -> None:
    tensors, labels = inputs(3)
    with pytest.raises(ValueError, match="labels"):
        spcl(tower, make_frame(3), *tensors, labels[:, :2])
    with pytest.raises(ValueError, match="suffix"):
        spcl(tower, make_frame(2), *tensors, labels)

"""cuDNN's fused convolutions: what they are asked for on a CPU, what they compute on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pspg.engine.models.clip import resnet_grid
from pspg.engine.models.frozen_image import FrozenImageTower
from pspg.engine.models.fused_convolution import convolution_shapes, fused_grid


@pytest.fixture
def tower(make_clip: Callable[..., Any]) -> FrozenImageTower:
    """With weights whose channels are all different, so that a forgotten bias or residual shows."""
    torch.manual_seed(0)
    return FrozenImageTower(make_clip(), torch.float64)


def images(side: int = 64) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)).double()


def test_without_fused_shapes_it_is_the_plain_network(tower: FrozenImageTower) -> None:
    assert torch.equal(fused_grid(tower.trunk, images(), ()), resnet_grid(tower.trunk, images()))


def test_what_cudnn_is_asked_for_is_the_same_network(tower: FrozenImageTower, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape alone and all at once, with cuDNN's two functions written out and a CPU passed off as a GPU."""
    calls: list[str] = []

    def relu(x: Tensor, w: Tensor, b: Tensor, *rest: Any) -> Tensor:
        calls.append("relu")
        return F.conv2d(x, w, b, *rest).relu()

    def add_relu(x: Tensor, w: Tensor, z: Tensor, alpha: float, b: Tensor, *rest: Any) -> Tensor:
        calls.append("add_relu")
        return (F.conv2d(x, w, b, *rest) + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
    expected, shapes = resnet_grid(tower.trunk, images()), convolution_shapes(tower.trunk)
    assert expected.abs().max() > 0
    for chosen in (*([shape] for shape in shapes), shapes):
        calls.clear()
        torch.testing.assert_close(fused_grid(tower.trunk, images(), chosen), expected, rtol=1e-12, atol=1e-12)
        assert set(calls) == {"add_relu" if shape.residual else "relu" for shape in chosen}


def test_without_cudnn_they_are_refused(tower: FrozenImageTower) -> None:
    tower.fused = convolution_shapes(tower.trunk)
    with pytest.raises(ValueError, match="need a GPU with cuDNN, the images are on cpu: fuse no shapes"):
        tower(images())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cudnn_computes_the_same(tower: FrozenImageTower, dtype: torch.dtype) -> None:
    """No further off than the plain network in the same dtype."""
    exact = resnet_grid(tower.trunk, images())
    trunk = tower.trunk.to("cuda", dtype).to(memory_format=torch.channels_last)
    given = images().to("cuda", dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        plain, fused = resnet_grid(trunk, given), fused_grid(trunk, given, convolution_shapes(trunk))
    errors = [(grid.cpu().double() - exact).norm() / exact.norm() for grid in (fused, plain)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps
    assert fused.is_contiguous(memory_format=torch.channels_last)

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pspg.engine.models.clip import ImageFeatures, image_features
from pspg.engine.models.frozen_image import FrozenImageTower

Make = Callable[[bool], Any]


@pytest.fixture
def make(make_clip: Callable[..., Any]) -> Make:
    """Function vit → float64 CLIP for `pixels`: S = 10 (ResNet, attention far from uniform) or 5 (ViT)."""

    def make(vit: bool) -> Any:
        clip = make_clip(vit=vit)
        if not vit:
            pool = clip.visual.attnpool
            pool.positional_embedding = nn.Parameter(torch.randn(10, pool.positional_embedding.shape[1]).double())
            pool.q_proj.weight.data *= 4
        return clip

    return make


def pixels(batch: int, vit: bool) -> Tensor:
    side = 32 if vit else 96
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch)).double()


def close(actual: ImageFeatures, expected: ImageFeatures) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def weights(tower: nn.Module) -> list[Tensor]:
    return [*tower.parameters(), *tower.buffers()]


@pytest.mark.parametrize("vit", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_function(make: Make, vit: bool, batch: int) -> None:
    clip, images = make(vit), pixels(batch, vit)
    expected = image_features(clip, images)
    close(FrozenImageTower(clip)(images), expected)
    clip.train()
    close(FrozenImageTower(clip).train()(images), expected)


def test_folding_does_not_round(make: Make) -> None:
    clip, images = make(False).float(), pixels(2, False)
    close(FrozenImageTower(clip, torch.float64)(images), image_features(deepcopy(clip).double(), images))


@pytest.mark.parametrize("vit", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_clip_stays_as_it_is_and_shares_nothing(make: Make, vit: bool, dtype: torch.dtype | None) -> None:
    clip, images = make(vit), pixels(2, vit)
    before, expected = deepcopy(clip.state_dict()), image_features(clip, images)
    tower = FrozenImageTower(clip, dtype)
    features = tower(images)
    after = clip.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in clip.parameters())
    assert all(torch.equal(*pair) for pair in zip(image_features(clip, images), expected, strict=True))
    for tensor in after.values():
        tensor.zero_()
    assert all(torch.equal(*pair) for pair in zip(tower(images), features, strict=True))


@pytest.mark.parametrize("vit", [False, True])
def test_only_what_inference_needs(make: Make, vit: bool) -> None:
    clip = make(vit)
    tower = FrozenImageTower(clip, torch.float32).train()
    modules = list(tower.modules())
    assert not any(module.training or isinstance(module, nn.BatchNorm2d) for module in modules)
    assert not any(tensor.requires_grad or tensor.dtype != torch.float32 for tensor in weights(tower))
    for tensor in weights(tower):
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        assert tensor.is_contiguous(memory_format=layout)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    if not vit:
        # A convolution gains a bias. The pool's W_v stays for the context, W_c W_v joins it; b_k and a bias go.
        convolutions = sum(m.weight.numel() + m.out_channels for m in clip.visual.modules() if isinstance(m, nn.Conv2d))
        attention = clip.visual.attnpool
        pool = sum(p.numel() for p in attention.parameters()) + attention.c_proj.weight.numel()
        pool -= attention.k_proj.bias.numel() + attention.v_proj.bias.numel()
        assert sum(tensor.numel() for tensor in weights(tower)) == convolutions + pool


def error(features: ImageFeatures, exact: ImageFeatures) -> Tensor:
    """Relative error of the global features and of the tokens, over all entries."""
    pairs = zip(features, exact, strict=True)
    return torch.stack([(got.double() - wanted).norm() / wanted.norm() for got, wanted in pairs])


@pytest.mark.parametrize("vit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_loses_no_more_than_the_literal_form(make: Make, vit: bool, dtype: torch.dtype) -> None:
    clip, images = make(vit), pixels(8, vit)
    exact = image_features(clip, images)
    features = FrozenImageTower(clip, dtype)(images)
    assert features.global_.dtype == features.tokens.dtype == dtype
    literal = error(image_features(deepcopy(clip).to(dtype), images.to(dtype)), exact)
    assert (error(features, exact) <= 1.25 * literal + torch.finfo(dtype).eps / 4).all()


def test_autocast_stays_outside(make: Make) -> None:
    tower, images = FrozenImageTower(make(False), torch.float32), pixels(2, False)
    expected = tower(images)
    with torch.autocast("cpu", torch.bfloat16):
        features = tower(images)
    assert all(torch.equal(*pair) for pair in zip(features, expected, strict=True))


def test_images_of_any_layout_stay_channels_last(make: Make) -> None:
    tower, seen = FrozenImageTower(make(False), torch.float32), []
    for module in tower.trunk.modules():
        if isinstance(module, nn.Conv2d | nn.AvgPool2d | nn.ReLU):
            module.register_forward_hook(lambda _, __, output: seen.append(output))
    tower(pixels(2, False))
    assert len(seen) > 20
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in seen)

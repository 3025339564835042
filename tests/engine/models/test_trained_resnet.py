"""The image tower in training, layer by layer: open_clip's own bits on a CPU, and the same step with kernels."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import open_clip
import pytest
import torch
from torch import Tensor, nn

from pspg.engine.models import trained_resnet
from pspg.engine.models.clip import build_clip, resnet_grid
from pspg.engine.models.trained_resnet import encode_training_images, image_products


class OtherNorm(nn.BatchNorm2d):
    """As one over all ranks."""


@pytest.fixture
def clip() -> open_clip.CLIP:
    """A ResNet of five blocks in training, its last norms not zero as they come."""
    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": {"layers": [2, 1, 1, 1], "width": 8, "image_size": 32}, "text_cfg": text}
    clip = build_clip(config).train()
    for name, weight in clip.visual.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.normal_(weight)
    return clip


def outcome(
    clip: open_clip.CLIP, encode: Callable[[Any, Tensor], Tensor], *, steps: int = 2, enabled: bool = False
) -> dict[str, Any]:
    """Features, gradients of all weights and of the images, and buffers, behind some steps."""
    clip = deepcopy(clip)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images = images.to(next(clip.parameters()).dtype, memory_format=torch.channels_last).requires_grad_()
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            features = encode(clip, images)
        features.square().sum().backward()
    found = {"features": features, "images": images.grad, **dict(clip.visual.named_buffers())}
    return found | {name: weight.grad for name, weight in clip.visual.named_parameters()}


@pytest.mark.parametrize("enabled", [False, True])
def test_on_a_cpu_its_layers_are_open_clips_bit_for_bit(clip: open_clip.CLIP, enabled: bool) -> None:
    """All that lies before the pool: the mean of the grid in its place."""

    def without_pool(pool: Any, grid: Tensor, cast: Any = None) -> Tensor:
        return grid.mean((2, 3))

    with patch.object(trained_resnet, "_pooled", without_pool):
        found = outcome(clip, encode_training_images, enabled=enabled)
    expected = outcome(clip, lambda clip, x: without_pool(None, resnet_grid(clip.visual, x)), enabled=enabled)
    assert found.keys() == expected.keys()
    assert expected["bn1.num_batches_tracked"] == 2
    assert [name for name, tensor in expected.items() if not same(tensor, found[name])] == []


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def test_it_is_open_clips_tower(clip: open_clip.CLIP) -> None:
    clip = clip.double()
    found, expected = (
        outcome(clip, encode) for encode in (encode_training_images, lambda clip, x: clip.encode_image(x))
    )
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        torch.testing.assert_close(found[name], right, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_with_kernels_it_is_the_same_step(clip: open_clip.CLIP) -> None:
    from tests.kernels import interpreter

    interpreter.repair()
    found = outcome(clip, lambda clip, images: encode_training_images(clip, images, impl="triton"), steps=1)
    eager = outcome(clip, encode_training_images, steps=1)
    exact = outcome(clip.double(), encode_training_images, steps=1)
    for name, right in exact.items():
        error, usual = ((tensor.double() - right.double()).norm() for tensor in (found[name], eager[name]))
        size = right.double().norm()
        assert error <= 4 * usual + 1e-5 * size, f"{name}: off by {error:.3g}, eager by {usual:.3g}, of {size:.3g}"


@pytest.mark.parametrize("change", ["evaluation", "synchronised", "frozen norm", "no momentum", "activation", "block"])
def test_layers_that_differ_are_called_as_they_are(clip: open_clip.CLIP, change: str) -> None:
    visual: Any = clip.visual
    if change == "evaluation":
        clip.eval()
    elif change == "synchronised":
        visual.layer2[0].bn2.__class__ = OtherNorm
    elif change == "frozen norm":
        visual.layer1[0].downsample[-1].eval()
    elif change == "no momentum":
        visual.bn2.momentum = None
    elif change == "activation":
        visual.layer4[0].act3 = nn.GELU()
    else:
        visual.layer1[1] = nn.Identity()
    expected, images = deepcopy(clip), torch.randn(2, 3, 32, 32)
    with patch.object(trained_resnet, "batch_norm", side_effect=AssertionError):
        found = encode_training_images(clip, images)
    torch.testing.assert_close(found, expected.encode_image(images), rtol=1e-4, atol=1e-5)
    images_weights = image_products(clip)
    assert not any(weight is conv.weight for weight in images_weights for conv in (visual.conv1, visual.conv3))
    assert len(images_weights) == (0 if change == "evaluation" else 6)


def test_a_vit_is_called_as_it_is(make_clip: Callable[..., Any]) -> None:
    clip = make_clip(vit=True).float().train()
    found, expected = encode_training_images(clip, (x := torch.randn(2, 3, 32, 32))), clip.encode_image(x)
    assert torch.equal(found, expected)

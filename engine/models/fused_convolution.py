"""Convolutions of a frozen ResNet with bias, ReLU and the residual inside one cuDNN call, for chosen shapes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Shape(NamedTuple):
    """A convolution of a ResNet, as far as its speed depends on the network."""

    inputs: int
    """channels"""
    outputs: int
    """channels"""
    kernel: int
    """side in pixels"""
    stride: int
    residual: bool
    """something is added before the ReLU"""


def convolution_shapes(trunk: Any) -> list[Shape]:
    """Shapes of a ModifiedResNet's convolutions that a ReLU follows, each once, in the order that they run."""
    plain = [trunk.conv1, trunk.conv2, trunk.conv3]
    shapes = [_shape(conv, residual=False) for conv in plain]
    for block in _blocks(trunk):
        shapes += [_shape(block.conv1, residual=False), _shape(block.conv2, residual=False)]
        shapes.append(_shape(block.conv3, residual=True))
    return list(dict.fromkeys(shapes))


def fused_grid(trunk: Any, images: Tensor, fused: Collection[Shape]) -> Tensor:
    """`resnet_grid` of a ModifiedResNet whose batch norms are folded, with cuDNN's fused form for the `fused` shapes.

    Args:
        trunk: ModifiedResNet for inference; each convolution has a bias.
        images: (B,3,h,w).

    Returns:
        (B,channels,h/32,w/32); without gradients.

    Raises:
        ValueError: the images are not on a GPU that cuDNN runs on.
    """
    if fused and not (images.is_cuda and torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled):
        raise ValueError(f"fused convolutions need a GPU with cuDNN, the images are on {images.device}: fuse no shapes")
    x = images
    for conv in (trunk.conv1, trunk.conv2, trunk.conv3):
        x = _convolve(conv, x, None, fused)
    x = trunk.avgpool(x)
    for block in _blocks(trunk):
        inner = block.avgpool(_convolve(block.conv2, _convolve(block.conv1, x, None, fused), None, fused))
        identity = x if block.downsample is None else block.downsample(x)
        x = _convolve(block.conv3, inner, identity, fused)
    return x


def _convolve(conv: nn.Conv2d, x: Tensor, residual: Tensor | None, fused: Collection[Shape]) -> Tensor:
    """relu(conv(x) + residual)."""
    if _shape(conv, residual=residual is not None) not in fused:
        out = conv(x)
        return (out if residual is None else out.add_(residual)).relu_()
    rest: tuple[Any, ...] = conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    if residual is None:
        return torch.cudnn_convolution_relu(x, conv.weight, *rest)
    return torch.cudnn_convolution_add_relu(x, conv.weight, residual, 1.0, *rest)


def _shape(conv: nn.Conv2d, *, residual: bool) -> Shape:
    return Shape(conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], residual)


def _blocks(trunk: Any) -> list[Any]:
    return [block for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4) for block in stage]

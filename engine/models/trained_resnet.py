"""The image tower of a CLIP in training: of a ResNet, batch norm with its residual and ReLU as one operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import open_clip
import torch.nn.functional as F
from open_clip.modified_resnet import Bottleneck, ModifiedResNet
from torch import Tensor, nn
from torch.func import functional_call

from pspg.kernels.batch_norm import Running, batch_norm, batch_norm_twice

from .cast_weights import CastWeights


def encode_training_images(
    clip: open_clip.CLIP, images: Tensor, *, impl: str = "auto", cast: CastWeights | None = None
) -> Tensor:
    """`clip.encode_image` of images (B,3,h,w): raw features (B,D); running statistics change as there.

    A ModifiedResNet in training whose layers are open_clip's own goes layer by layer, with `kernels.batch_norm` for
    norm, addition and ReLU; on a CPU these are the same operators, bit for bit. Modules that have weights are not
    called, so weights have to be whole. Any other tower is called as it is.

    Args:
        impl: of the norms: triton, eager, reference or auto.
        cast: of `image_products`, for such a ResNet; None: the parameters.

    Raises:
        ValueError: an `impl` that cannot run.
    """
    trunk: Any = clip.visual
    if not _is_plain(trunk):
        features: Tensor = clip.encode_image(images)
        return features
    how = _How(impl, cast or CastWeights((), images))
    x = images
    for conv, norm in ((trunk.conv1, trunk.bn1), (trunk.conv2, trunk.bn2), (trunk.conv3, trunk.bn3)):
        x = _norm(norm, how.convolve(conv, x), how)
    x = shortcut = trunk.avgpool(x)
    for block in _blocks(trunk):
        x, shortcut = _bottleneck(block, x, shortcut, how)
    weights = {name: how.cast.of(parameter) for name, parameter in trunk.attnpool.named_parameters()}
    pooled: Tensor = functional_call(trunk.attnpool, weights, (x,))
    return pooled


def image_products(clip: open_clip.CLIP) -> list[nn.Parameter]:
    """Parameters that only enter products, of an image tower that `encode_training_images` takes apart; else none."""
    layers = clip.visual.modules() if _is_plain(clip.visual) else ()
    return [weight for layer in layers if isinstance(layer, nn.Conv2d | nn.Linear) for weight in layer.parameters()]


class _How(NamedTuple):
    impl: str
    cast: CastWeights

    def convolve(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        weight, bias = self.cast.of(conv.weight), conv.bias
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _bottleneck(block: Any, x: Tensor, shortcut: Tensor, how: _How) -> tuple[Tensor, Tensor]:
    """A block's result, for the branch and for the shortcut of the next."""
    inner = _norm(block.bn1, how.convolve(block.conv1, x), how)
    inner = block.avgpool(_norm(block.bn2, how.convolve(block.conv2, inner), how))
    if block.downsample is not None:
        pool, conv, norm = block.downsample
        shortcut = _norm(norm, how.convolve(conv, pool(shortcut)), how, relu=False)
    given, options = _arguments(block.bn3, how.convolve(block.conv3, inner), shortcut)
    return batch_norm_twice(*given, **options, impl=how.impl)


def _norm(norm: Any, x: Tensor, how: _How, *, relu: bool = True) -> Tensor:
    given, options = _arguments(norm, x, None)
    return batch_norm(*given, **options, relu=relu, impl=how.impl)


def _arguments(norm: Any, x: Tensor, residual: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kept = Running(norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return (x, norm.weight, norm.bias, kept, residual), {"momentum": norm.momentum, "eps": norm.eps}


def _is_plain(trunk: nn.Module) -> bool:
    """A ResNet of open_clip's classes alone, all of it in training, with norms as they come."""
    if type(trunk) is not ModifiedResNet or not all(type(block) is Bottleneck for block in _blocks(trunk)):
        return False
    norms = [trunk.bn1, trunk.bn2, trunk.bn3]
    activations = [trunk.act1, trunk.act2, trunk.act3]
    for block in _blocks(trunk):
        norms += [block.bn1, block.bn2, block.bn3]
        activations += [block.act1, block.act2, block.act3]
        if block.downsample is not None:
            norms.append(block.downsample[-1])
    return all(_is_ordinary(norm) for norm in norms) and all(type(layer) is nn.ReLU for layer in activations)


def _is_ordinary(norm: Any) -> bool:
    """Trains, with weights and running statistics of a fixed momentum; not one over all ranks."""
    plain = type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats
    return plain and norm.training and norm.momentum is not None


def _blocks(trunk: Any) -> list[Any]:
    return [block for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4) for block in stage]

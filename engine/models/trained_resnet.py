"""The image tower of a CLIP in training: of a ResNet, batch norm with its residual and ReLU as one operator."""

from __future__ import annotations

from typing import Any

import open_clip
from open_clip.modified_resnet import Bottleneck, ModifiedResNet
from torch import Tensor, nn

from pspg.kernels.batch_norm import Running, batch_norm, batch_norm_twice


def encode_training_images(clip: open_clip.CLIP, images: Tensor, *, impl: str = "auto") -> Tensor:
    """`clip.encode_image` of images (B,3,h,w): raw features (B,D); running statistics change as there.

    A ModifiedResNet in training whose layers are open_clip's own goes layer by layer, with `kernels.batch_norm` for
    norm, addition and ReLU; on a CPU these are the same operators, bit for bit. Modules are called but for norms and
    activations, so weights have to be whole. Any other tower is called as it is.

    Args:
        impl: of the norms: triton, eager, reference or auto.

    Raises:
        ValueError: an `impl` that cannot run.
    """
    trunk: Any = clip.visual
    if not _is_plain(trunk):
        features: Tensor = clip.encode_image(images)
        return features
    x = images
    for conv, norm in ((trunk.conv1, trunk.bn1), (trunk.conv2, trunk.bn2), (trunk.conv3, trunk.bn3)):
        x = _norm(norm, conv(x), impl)
    x = shortcut = trunk.avgpool(x)
    for block in _blocks(trunk):
        x, shortcut = _bottleneck(block, x, shortcut, impl)
    pooled: Tensor = trunk.attnpool(x)
    return pooled


def _bottleneck(block: Any, x: Tensor, shortcut: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """A block's result, for the branch and for the shortcut of the next."""
    inner = _norm(block.bn1, block.conv1(x), impl)
    inner = block.avgpool(_norm(block.bn2, block.conv2(inner), impl))
    if block.downsample is not None:
        pool, conv, norm = block.downsample
        shortcut = _norm(norm, conv(pool(shortcut)), impl, relu=False)
    given, options = _arguments(block.bn3, block.conv3(inner), shortcut)
    return batch_norm_twice(*given, **options, impl=impl)


def _norm(norm: Any, x: Tensor, impl: str, *, relu: bool = True) -> Tensor:
    given, options = _arguments(norm, x, None)
    return batch_norm(*given, **options, relu=relu, impl=impl)


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

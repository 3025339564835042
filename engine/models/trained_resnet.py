"""The image tower of a CLIP in training: a ResNet with fused norms and a pool of one query; others as they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import Bottleneck, ModifiedResNet
from torch import Tensor, nn

from pspg.kernels.batch_norm import Norm, batch_norm, batch_norm_twice

from .cast_weights import CastWeights
from .clip import resnet_grid


def encode_training_images(
    clip: open_clip.CLIP, images: Tensor, *, impl: str = "auto", cast: CastWeights | None = None
) -> Tensor:
    """`clip.encode_image` of images (B,3,h,w): raw features (B,D); running statistics change as there.

    The attention pool of a ModifiedResNet in training computes its one query alone and no keys or values (exact;
    kernels/MATH.md, section 9). If its layers are open_clip's own, they go one by one with `kernels.batch_norm` for
    norm, addition and ReLU (on a CPU the same operators, bit for bit). Modules that have weights are not called, so
    weights have to be whole. Any other tower is called as it is.

    Args:
        impl: of the norms: triton, eager, reference or auto.
        cast: of `image_products`; None: the parameters.

    Raises:
        ValueError: an `impl` that cannot run.
    """
    trunk: Any = clip.visual
    if not _trains(trunk):
        features: Tensor = clip.encode_image(images)
        return features
    cast = cast or CastWeights((), images)
    grid = _grid(trunk, images, _How(impl, cast)) if _is_plain(trunk) else resnet_grid(trunk, images)
    return _pooled(trunk.attnpool, grid, cast)


def image_products(clip: open_clip.CLIP) -> list[nn.Parameter]:
    """Parameters that only enter products in `encode_training_images`, but for those of modules that it calls."""
    if not _trains(clip.visual):
        return []
    pool = clip.visual.attnpool
    layers = [pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj]
    if _is_plain(clip.visual):
        layers += [layer for layer in clip.visual.modules() if isinstance(layer, nn.Conv2d)]
    return [*(layer.weight for layer in layers), pool.q_proj.bias, pool.c_proj.bias]


def _grid(trunk: Any, images: Tensor, how: _How) -> Tensor:
    """`clip.resnet_grid`."""
    x = images
    for conv, norm in ((trunk.conv1, trunk.bn1), (trunk.conv2, trunk.bn2), (trunk.conv3, trunk.bn3)):
        x = _norm(norm, how.convolve(conv, x), how)
    x = shortcut = trunk.avgpool(x)
    for block in _blocks(trunk):
        x, shortcut = _bottleneck(block, x, shortcut, how)
    return x


def _pooled(pool: Any, grid: Tensor, cast: CastWeights) -> Tensor:
    """(B,D): the mean token attends to all; W_k goes into its query, W_v acts on the weighted mean of tokens."""
    x = grid.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + pool.positional_embedding.to(x.dtype)
    q = F.linear(x[:, 0], cast.of(pool.q_proj.weight), cast.of(pool.q_proj.bias)).unflatten(-1, (pool.num_heads, -1))
    w_k, w_v = (cast.of(layer.weight).unflatten(0, (pool.num_heads, -1)) for layer in (pool.k_proj, pool.v_proj))
    absorbed = torch.einsum("bhd,hde->bhe", q, w_k)
    # The heads are the queries of one head as wide as the tokens, which are its keys and its values.
    scale = q.shape[-1] ** -0.5
    means = F.scaled_dot_product_attention(absorbed[:, None], x[:, None], x[:, None], scale=scale)[:, 0]
    # The bias of keys shifts all scores alike: its gradient is zero, not missing.
    bias = pool.v_proj.bias + 0 * pool.k_proj.bias
    context = torch.einsum("bhe,hde->bhd", means, w_v).flatten(1) + bias
    return F.linear(context, cast.of(pool.c_proj.weight), cast.of(pool.c_proj.bias))


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
    return batch_norm_twice(how.convolve(block.conv3, inner), _of(block.bn3), shortcut, impl=how.impl)


def _norm(norm: Any, x: Tensor, how: _How, *, relu: bool = True) -> Tensor:
    return batch_norm(x, _of(norm), relu=relu, impl=how.impl)


def _of(module: Any) -> Norm:
    return Norm(*(getattr(module, name) for name in Norm._fields))


def _trains(trunk: nn.Module) -> bool:
    return type(trunk) is ModifiedResNet and trunk.training


def _is_plain(trunk: Any) -> bool:
    """A ResNet of open_clip's blocks alone, all of it in training, with norms as they come."""
    if not all(type(block) is Bottleneck for block in _blocks(trunk)):
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

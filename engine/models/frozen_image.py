"""The frozen image tower prepared for inference: batch norm folded, attention pool absorbed, low precision."""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from itertools import pairwise
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pspg.kernels.precision import no_autocast

from .clip import ImageFeatures, resnet_grid, vit_features, with_unit_token
from .encoders import ImageEncoder
from .fused_convolution import Shape, fused_grid


class FrozenImageTower(nn.Module):
    """`image_features` of a CLIP for inference alone: the same function in real arithmetic, fewer operations.

    It shares no memory with the CLIP, which stays as it is; always in eval mode; no parameter requires a gradient.
    A ResNet's batch norms are folded into its convolutions, its attention pool becomes an `AbsorbedPool`. Both are
    folded in float64, so that only the cast to `dtype` rounds.

    Args:
        clip: with an image tower that `image_features` can drive.
        dtype: of the parameters and of the results; None: that of the CLIP's image tower.

    Attributes:
        fused: convolutions of a ResNet that take bias, ReLU and residual with them, which cuDNN does on a GPU
            (`convolution_shapes` lists a trunk's). Set it to a choice that was measured; none so far, so none by
            default.
    """

    @torch.no_grad()
    def __init__(self, clip: open_clip.CLIP, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        visual = clip.visual
        resnet = isinstance(visual, ModifiedResNet)
        self.fused: Collection[Shape] = ()
        self.trunk = _folded_trunk(visual) if resnet else deepcopy(visual)
        self.pool = AbsorbedPool(visual.attnpool) if resnet else None
        self.to(dtype or next(visual.parameters()).dtype).to(memory_format=torch.channels_last)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FrozenImageTower:
        """Stays in eval mode, also as part of a module that trains."""
        return super().train(False)

    def forward(self, images: Tensor) -> ImageFeatures:
        """Global features (B,D) and tokens (B,S,D), in the tower's dtype, of images (B,3,h,w) of any float dtype.

        Autocast does not reach inside.

        Raises:
            ValueError: `fused` names shapes, and the images are not on a GPU with cuDNN.
        """
        images = images.to(next(self.trunk.parameters()).dtype, memory_format=torch.channels_last)
        with no_autocast(images):
            if isinstance(self.trunk, ImageEncoder):
                return with_unit_token(*self.trunk.tokens(images))
            if self.pool is None:
                return with_unit_token(*vit_features(self.trunk, images))
            grid = fused_grid(self.trunk, images, self.fused) if self.fused else resnet_grid(self.trunk, images)
            return with_unit_token(*self.pool(grid))


class AbsorbedPool(nn.Module):
    """open_clip's attention pool with the mean token x̄ as its one query, without keys and values.

    With the E channels of the tokens x_s in heads h of width d:

        q = (W_q x̄ + b_q)/√d      p_h = softmax_s((W_{k,h}ᵀ q_h)·x_s)     b_k shifts all scores alike and cancels
        u = W_c [W_{v,h} Σ_s p_{h,s} x_s]_h + b                           Σ_s p_{h,s} = 1, so b_v moves into b
        local token s = W_c W_v x_s + b                                   b = W_c b_v + b_c

    One (E,D) matrix runs over all tokens; the others run over one vector an image.

    Args:
        pool: an open_clip AttentionPool2d.
    """

    def __init__(self, pool: Any) -> None:
        super().__init__()
        heads = pool.num_heads
        scale = (pool.q_proj.in_features // heads) ** -0.5
        # Copies even of float64 weights, which would otherwise be shared with the CLIP.
        state = {name: tensor.detach().to(torch.float64, copy=True) for name, tensor in pool.state_dict().items()}
        out, value = state["c_proj.weight"], state["v_proj.weight"]
        self.positions = nn.Parameter(state["positional_embedding"])  # (S,E)
        self.query = nn.Parameter(scale * state["q_proj.weight"])  # (E,E)
        self.query_bias = nn.Parameter(scale * state["q_proj.bias"])
        self.key = nn.Parameter(state["k_proj.weight"].unflatten(0, (heads, -1)))  # (heads,d,E)
        self.value = nn.Parameter(value.unflatten(0, (heads, -1)))  # (heads,d,E)
        self.out = nn.Parameter(out)  # (D,E)
        self.local = nn.Parameter(out @ value)  # (D,E)
        self.bias = nn.Parameter(out @ state["v_proj.bias"] + state["c_proj.bias"])  # (D,)

    def forward(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled feature (B,D) and local tokens (B,S-1,D) of the trunk's grid (B,E,h,w)."""
        x = grid.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1).add_(self.positions)
        query = F.linear(x[:, 0], self.query, self.query_bias).unflatten(-1, (len(self.key), -1))
        absorbed = torch.einsum("bhd,hde->bhe", query, self.key)
        # The heads are the queries of one head as wide as the tokens, which are its keys and its values.
        means = F.scaled_dot_product_attention(absorbed[:, None], x[:, None], x[:, None], scale=1.0)[:, 0]
        context = torch.einsum("bhe,hde->bhd", means, self.value).flatten(1)
        # All of x, as its local part alone is not contiguous and would be copied.
        tokens = F.linear(x, self.local, self.bias)
        return F.linear(context, self.out, self.bias), tokens[:, 1:]


def _folded_trunk(visual: ModifiedResNet) -> ModifiedResNet:
    """Copy of a ModifiedResNet without its attention pool, in float64, each batch norm in the convolution before it."""
    # What deepcopy finds in its memo it takes for copied: the originals are replaced without being copied first.
    memo: dict[int, Any] = {id(visual.attnpool): nn.Identity()}
    for parent in visual.modules():
        for conv, norm in pairwise(parent.children()):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                memo[id(conv)] = fuse_conv_bn_eval(deepcopy(conv).double().eval(), deepcopy(norm).double().eval())
                memo[id(norm)] = nn.Identity()
    return deepcopy(visual, memo)

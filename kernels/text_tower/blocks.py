"""Pieces of a frozen text tower: gradients reach inputs, never weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .block_operations import Passes, add_norm, attend, of_prefix, of_tail
from .reference import TextLayer, TextTower

_QUICK = 1.702
"""QuickGELU(x) = x·sigmoid(1.702 x) = silu(1.702 x) / 1.702."""


def require_frozen(tower: TextTower) -> None:
    """Refuse a tower whose weights want gradients: these forms would drop them.

    Raises:
        ValueError: such a tower.
    """
    if not is_frozen(tower):
        raise ValueError(
            "eager and triton give no gradients to the tower's weights: freeze them, or use impl='reference'"
        )


def is_frozen(tower: TextTower) -> bool:
    """Whether no weight of the tower requires a gradient."""
    return not (torch.is_grad_enabled() and any(weight.requires_grad for weight in tower.tensors()))


def mlp(tower: TextTower, layer: TextLayer, y: Tensor) -> Tensor:
    """As `Passes.mlp`."""
    quick = tower.activation == "quick_gelu"
    return _MLP.apply(y, layer.fc_weight, layer.fc_bias, layer.proj_weight, layer.proj_bias, quick)


EAGER = Passes(add_norm, mlp, attend, of_prefix, of_tail)


def project(layer: TextLayer, y: Tensor) -> Tensor:
    """Queries, keys and values (…,3W) of a block's normalised input y (…,W)."""
    return F.linear(y, layer.in_proj_weight, layer.in_proj_bias)


def after_attention(
    tower: TextTower, passes: Passes, layer: TextLayer, x: Tensor, attended: Tensor
) -> tuple[Tensor, Tensor]:
    """The rest of a block on x (…,W): output projection, residual, MLP.

    Returns:
        The residual stream without the MLP, and the MLP's part of it: the next block adds them as it normalises.
    """
    delta = F.linear(attended, layer.out_proj_weight, layer.out_proj_bias)
    x, y = passes.add_norm(tower, x, delta, layer.ln_2_weight, layer.ln_2_bias)
    return x, passes.mlp(tower, layer, y)


def last_block(
    tower: TextTower, passes: Passes, x: Tensor, query: Tensor, tokens: Tensor, mask: Tensor | None
) -> Tensor:
    """The last block for one token a sequence, and the feature read from it.

    Only that token has a query. Its score of token t is q_hᵀ(W_k,h y_t + b_k,h), so W_k goes into the query, and b_k,
    the same for all t, drops out of the softmax; weights sum to 1, so W_v and b_v act on the weighted mean of the y_t.
    Keys and values are never formed.

    Args:
        x: (R,W) the token's input of the block.
        query: (R,W) the same after the block's first LayerNorm.
        tokens: (R,K,W) all tokens it sees, after that LayerNorm.
        mask: (R,1,1,K) or (1,1,1,K), true is seen; None: all.

    Returns:
        (R,D).
    """
    layer, heads = tower.layers[-1], tower.heads
    w_q, w_k, w_v = layer.in_proj_weight.chunk(3)
    b_q, _, b_v = layer.in_proj_bias.chunk(3)
    w_k, w_v = (w.unflatten(0, (heads, -1)) for w in (w_k, w_v))  # (heads, d, W)
    q = F.linear(query, w_q, b_q).unflatten(-1, (heads, -1))  # (R, heads, d)
    absorbed = torch.einsum("rhd,hdw->rhw", q, w_k)[:, None]
    seen = tokens[:, None]
    mean = F.scaled_dot_product_attention(absorbed, seen, seen, attn_mask=mask, scale=q.shape[-1] ** -0.5)[:, 0]
    context = torch.einsum("rhw,hdw->rhd", mean, w_v).flatten(1) + b_v
    x, delta = after_attention(tower, passes, layer, x, context)
    return passes.add_norm(tower, x, delta, tower.ln_final_weight, tower.ln_final_bias)[1] @ tower.projection


class _MLP(torch.autograd.Function):
    """MLP of a block with input gradients only; it keeps the hidden layer before its activation and nothing else.

    With QuickGELU the hidden layer is scaled by 1.702 within the products, so that the activation is one pass of silu;
    the two scales cancel in backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor, quick: bool) -> Tensor:
        rows = x.flatten(0, -2)
        if quick:
            hidden = torch.addmm(b_fc, rows, w_fc.T, beta=_QUICK, alpha=_QUICK)
            out = torch.addmm(b_proj, F.silu(hidden), w_proj.T, alpha=1 / _QUICK)
        else:
            hidden = torch.addmm(b_fc, rows, w_fc.T)
            out = torch.addmm(b_proj, F.gelu(hidden), w_proj.T)
        ctx.save_for_backward(hidden, w_fc, w_proj)
        ctx.quick = quick
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, w_fc, w_proj = ctx.saved_tensors
        activated = gradient.flatten(0, -2) @ w_proj
        backward = torch.ops.aten.silu_backward if ctx.quick else torch.ops.aten.gelu_backward
        return (backward(activated, hidden) @ w_fc).view(gradient.shape), None, None, None, None, None

"""Blocks of a frozen text tower, from matrix products and block operations: gradients reach inputs, never weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_operations import BlockOperations, RaggedPairs, Stream
from .reference import TextLayer, TextTower


def is_frozen(tower: TextTower) -> bool:
    """True if no weight of the tower requires a gradient."""
    return not (torch.is_grad_enabled() and any(weight.requires_grad for weight in tower.tensors()))


def require_frozen(tower: TextTower) -> None:
    """Refuse a tower whose weights require gradients, which its blocks would drop.

    Raises:
        ValueError: such a tower.
    """
    if not is_frozen(tower):
        raise ValueError(
            "eager and triton give no gradients to the tower's weights: freeze them, or use impl='reference'"
        )


def project(tower: TextTower, operations: BlockOperations, layer: TextLayer, stream: Stream) -> tuple[Stream, Tensor]:
    """The stream, and queries, keys and values (…,3W) of its first LayerNorm in a block."""
    products = operations.products(tower, stream.x)
    if products is not None:
        return products.project(tower, layer, stream)
    x, y = operations.add_norm(tower, stream.x, stream.delta, layer.ln_1_weight, layer.ln_1_bias)
    return Stream(x), F.linear(y, layer.in_proj_weight, layer.in_proj_bias)


def finish(tower: TextTower, operations: BlockOperations, layer: TextLayer, stream: Stream, attended: Tensor) -> Stream:
    """The stream after the rest of a block: output projection of what was attended (…,W), residual, MLP."""
    products = operations.products(tower, stream.x)
    if products is not None:
        return products.finish(tower, layer, stream, attended)
    delta = F.linear(attended, layer.out_proj_weight, layer.out_proj_bias)
    x, y = operations.add_norm(tower, stream.total(), delta, layer.ln_2_weight, layer.ln_2_bias)
    # The next block adds the MLP as it normalises.
    return Stream(x, operations.mlp(tower, layer, y))


def last_block(
    tower: TextTower,
    operations: BlockOperations,
    x: Tensor,
    query: Tensor,
    prefix: Tensor,
    own: Tensor,
    pairs: RaggedPairs,
) -> Tensor:
    """The last block for one token a sequence, and the feature read from it.

    Only that token has a query. Its score of token t is q_hᵀ(W_k,h y_t + b_k,h), so W_k goes into the query, and b_k,
    the same for all t, drops out of the softmax; weights sum to 1, so W_v and b_v act on the weighted mean of the y_t.
    Keys and values are never formed.

    Args:
        x: (R,W) the pooled token's input of the block.
        query: (R,W) the same after the block's first LayerNorm.
        prefix, own: (N,S,W) tokens of prefixes and (R,T,W) of suffixes, after that LayerNorm.
        pairs: which sequence continues which prefix, and where it is pooled.

    Returns:
        (R,D).
    """
    layer, heads = tower.layers[-1], tower.heads
    w_q, w_k, w_v = layer.in_proj_weight.chunk(3)
    b_q, _, b_v = layer.in_proj_bias.chunk(3)
    w_k, w_v = (w.unflatten(0, (heads, -1)) for w in (w_k, w_v))  # (heads, d, W)
    q = F.linear(query, w_q, b_q).unflatten(-1, (heads, -1)).transpose(0, 1)  # (heads, R, d)
    mean = operations.pooled_attention(q @ w_k, prefix, own, pairs, q.shape[-1] ** -0.5)
    context = torch.baddbmm(b_v.view(heads, 1, -1), mean, w_v.mT).transpose(0, 1).flatten(1)
    stream = finish(tower, operations, layer, Stream(x), context)
    y = operations.add_norm(tower, stream.x, stream.delta, tower.ln_final_weight, tower.ln_final_bias)[1]
    return y @ tower.projection


def token_bytes(tower: TextTower, operations: BlockOperations) -> int:
    """Upper estimate of the bytes that backward keeps of one prefix or suffix token, all layers together.

    A layer keeps the hidden layer of the MLP, `operations.kept_widths` times W, and float32 statistics of each head
    and of two LayerNorms; the last layer, which keeps less, counts as one of them.
    """
    hidden = len(tower.layers[0].fc_bias)
    width = len(tower.layers[0].proj_bias)
    numbers = (operations.kept_widths * width + hidden) * tower.projection.element_size() + 4 * (tower.heads + 4)
    return len(tower.layers) * numbers

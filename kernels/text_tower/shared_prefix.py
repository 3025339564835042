"""Pair prompts through the text tower without repeating what pairs share; exact in real arithmetic.

The tower is causal, so the prefix [SOS, V_i] of pair (i, j) has the same hidden states whatever follows: its keys and
values are computed once for each i. The tail [V_j, EOS] enters the first layer the same whatever precedes: its queries,
keys and values there are computed once for each j. In the last layer only EOS is read: it alone has a query and an MLP.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import TextLayer, TextTower, layer_norm, mlp
from .sequences import Frame, pair_indices


def encode_pairs(tower: TextTower, frame: Frame, prompts: Tensor) -> Tensor:
    """(P,D) features of the pair prompts of `prompts` (C,n,W), as `spcl.pair_features`; not for prefix mode."""
    classes, n, _ = prompts.shape
    first, second = pair_indices(classes, prompts.device)
    positions = tower.positional_embedding
    prefix = torch.cat([frame.sos.expand(classes, 1, -1), prompts], dim=1) + positions[: n + 1]  # (C,n+1,W)
    x = torch.cat([prompts, frame.suffix], dim=1) + positions[n + 1 : 2 * n + 2]  # (C,n+1,W): tails, until they meet i
    length, last = n + 1, len(tower.layers) - 1
    causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    # A tail's token sees the whole prefix, and the tail up to itself.
    mask = torch.cat([torch.ones_like(causal), causal], dim=1)
    for number, layer in enumerate(tower.layers):
        q, k, v = _project(tower, layer, x)
        prefix_q, prefix_k, prefix_v = _project(tower, layer, prefix)
        if number < last:
            attended = F.scaled_dot_product_attention(prefix_q, prefix_k, prefix_v, attn_mask=causal)
            prefix = _finish(tower, layer, prefix, attended)
        if number == last:
            x, q, mask = x[:, -1:], q[:, :, -1:], mask[-1:]
        if number == 0:
            x, q, k, v = (part.index_select(0, second) for part in (x, q, k, v))
        k = torch.cat([prefix_k.index_select(0, first), k], dim=2)
        v = torch.cat([prefix_v.index_select(0, first), v], dim=2)
        x = _finish(tower, layer, x, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    return layer_norm(tower, x[:, -1], tower.ln_final_weight, tower.ln_final_bias) @ tower.projection


def _project(tower: TextTower, layer: TextLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (N, heads, T, d) of x (N,T,W)."""
    y = layer_norm(tower, x, layer.ln_1_weight, layer.ln_1_bias)
    q, k, v = F.linear(y, layer.in_proj_weight, layer.in_proj_bias).chunk(3, dim=-1)
    return _split(q, tower.heads), _split(k, tower.heads), _split(v, tower.heads)


def _split(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def _finish(tower: TextTower, layer: TextLayer, x: Tensor, attended: Tensor) -> Tensor:
    """The rest of a block: output projection, residual, MLP, residual."""
    x = x + F.linear(attended.transpose(1, 2).flatten(2), layer.out_proj_weight, layer.out_proj_bias)
    return x + mlp(tower, layer, layer_norm(tower, x, layer.ln_2_weight, layer.ln_2_bias))

"""The literal equations as a careful engineer would tidy them: all pairs at once, fused attention, still 77 tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pspg.kernels.pair_loss import pair_loss
from pspg.kernels.text_tower import PromptTemplate, TextTower, pair_prompts, single_prompts
from pspg.kernels.text_tower.reference import layer_norm, mlp


def single_features(tower: TextTower, template: PromptTemplate, prompts: Tensor) -> Tensor:
    """(G,C,D) features of the single prompts (G,C,n,W)."""
    return torch.stack([_encode(tower, *single_prompts(s, template, tokens=tower.context_length)) for s in prompts])


def spcl(
    tower: TextTower,
    template: PromptTemplate,
    prompts: Tensor,
    image_vectors: Tensor,
    logit_scale: Tensor,
    labels: Tensor,
    pairs: tuple[Tensor, Tensor],
) -> Tensor:
    """SPCL of the given pairs of `prompts` (C,n,W), arguments as `kernels.spcl.spcl`."""
    embeddings, pooled = pair_prompts(prompts, template, *pairs, tokens=tower.context_length)
    features = _encode(tower, embeddings, pooled)
    return pair_loss(features, image_vectors, logit_scale, labels, pairs=pairs, impl="reference")


def _encode(tower: TextTower, embeddings: Tensor, pooled: Tensor) -> Tensor:
    """Text features (N,D) of sequences (N,T,W), with torch's fused causal attention."""
    x = embeddings + tower.positional_embedding[: embeddings.shape[1]]
    for layer in tower.layers:
        y = layer_norm(tower, x, layer.ln_1_weight, layer.ln_1_bias)
        q, k, v = (
            part.unflatten(-1, (tower.heads, -1)).transpose(1, 2)
            for part in F.linear(y, layer.in_proj_weight, layer.in_proj_bias).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.linear(attended, layer.out_proj_weight, layer.out_proj_bias)
        x = x + mlp(tower, layer, layer_norm(tower, x, layer.ln_2_weight, layer.ln_2_bias))
    x = x[torch.arange(len(x), device=x.device), pooled]
    return layer_norm(tower, x, tower.ln_final_weight, tower.ln_final_bias) @ tower.projection

"""The pair loss of prompts, the literal way: every pair's whole sequence through the text tower, all 77 tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..pairs import PairSelection
from ..text_tower import Prompts, PromptTemplate, TextTower, encode, pair_prompts


def pair_features(tower: TextTower, template: PromptTemplate, prompts: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(R,D) text features of the prompts of pairs (i, j), i and j (R,) int64, of `prompts` (C,n,W)."""
    embeddings, pooled = pair_prompts(prompts, template, first, second, tokens=tower.context_length)
    return encode(tower, embeddings, pooled, impl="reference")


def whole_loss(
    tower: TextTower,
    prompts: Prompts,
    image_vectors: Tensor,
    logit_scale: Tensor,
    loss: Callable[..., Tensor],
    pairs: PairSelection,
    memory: int,
) -> Tensor:
    """Loss of the selected pairs, all features first; arguments as `chunked_loss`, the cache and `memory` unused."""
    first, second, weights = pairs.to(prompts.vectors.device)
    features = pair_features(tower, prompts.template, prompts.vectors, first, second)
    return loss(features, image_vectors, logit_scale, pairs=(first, second), weights=weights, impl="reference")

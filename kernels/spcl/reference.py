"""Features of pair prompts, the literal way: every pair's whole sequence through the text tower."""

from __future__ import annotations

from torch import Tensor

from ..text_tower import Frame, TextTower, encode, pair_indices, pair_prompts


def pair_features(tower: TextTower, frame: Frame, prompts: Tensor) -> Tensor:
    """(P,D) text features of all pair prompts of `prompts` (C,n,W)."""
    first, second = pair_indices(len(prompts), prompts.device)
    embeddings, pooled = pair_prompts(prompts, frame, first, second)
    return encode(tower, embeddings, pooled, impl="reference")

"""Pair loss of prompts, the literal way: every pair's whole sequence through the text tower, all 77 tokens."""

from __future__ import annotations

from torch import Tensor

from ..text_tower import Frame, TextTower, encode, pair_prompts


def pair_features(tower: TextTower, frame: Frame, prompts: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(R,D) text features of the prompts of pairs (i, j), i and j (R,) int64, of `prompts` (C,n,W)."""
    embeddings, pooled = pair_prompts(prompts, frame, first, second, tokens=tower.context_length)
    return encode(tower, embeddings, pooled, impl="reference")

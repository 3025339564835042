"""From prompts to the pair loss: every pair prompt through the text tower, then the loss."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..pair_loss import pair_loss
from ..text_tower import Frame, TextTower, encode, pair_indices, pair_prompts


def pair_features(tower: TextTower, frame: Frame, prompts: Tensor) -> Tensor:
    """(P,D) text features of all pair prompts of `prompts` (C,n,W)."""
    first, second = pair_indices(len(prompts), prompts.device)
    embeddings, pooled = pair_prompts(prompts, frame, first, second)
    return encode(tower, embeddings, pooled, impl="reference")


def spcl(
    tower: TextTower,
    frame: Frame,
    prompts: Tensor,
    image_vectors: Tensor,
    logit_scale: Tensor,
    labels: Tensor,
    *,
    target: Literal["batch", "sample"] = "batch",
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """Pair loss of the prompts; arguments and result as `op.spcl`."""
    features = pair_features(tower, frame, prompts)
    return pair_loss(features, image_vectors, logit_scale, labels, target=target, reduction=reduction, impl="reference")

"""Scaled similarity of images and texts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_fp32, no_autocast


def similarity_logits(
    image_vectors: Tensor, text_features: Tensor, logit_scale: Tensor, *, unit: bool = False
) -> Tensor:
    """z = exp(logit_scale) · s·ŵ, the summed cosine similarities of paper eqs. 2 and 6.

    Summing over positions before the product, s = Σ_s x̂_s, is exact: Σ_s x̂_s·ŵ = (Σ_s x̂_s)·ŵ.

    Args:
        image_vectors: (B,D), weighted sum of the image's normalised tokens.
        text_features: (N,D), any norm; normalised here.
        logit_scale: scalar, log of the inverse temperature.
        unit: text features have unit norm already and are taken as they are.

    Returns:
        (B,N), float32 or better.
    """
    with no_autocast(image_vectors):
        texts = at_least_fp32(text_features)
        texts = texts if unit else F.normalize(texts, dim=-1)
        return at_least_fp32(logit_scale).exp() * at_least_fp32(image_vectors) @ texts.T

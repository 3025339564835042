"""Losses over pairs: the Soft Pairwise Co-occurrence Loss (paper eqs. 5 to 8), and PCL, its sample-level variant."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pairs import number_of_pairs
from ..precision import no_autocast
from ..similarity import similarity_logits


def pair_loss(
    pair_features: Tensor,
    image_vectors: Tensor,
    logit_scale: Tensor,
    labels: Tensor,
    first: Tensor,
    second: Tensor,
    weights: Tensor | None,
    *,
    present: Tensor | None = None,
    target: str = "batch",
    reduction: str = "sum",
) -> Tensor:
    """Binary cross-entropy of pair logits; arguments and result as `op.pair_loss`, for the pairs `first`, `second`."""
    logits = similarity_logits(image_vectors, pair_features, logit_scale)  # (B,R)
    with no_autocast(logits):
        positive = labels == 1  # uncertain (-1) labels count as absent
        both = (positive[:, first] & positive[:, second]).to(logits.dtype)  # (B,R): image b carries both labels
        images: int | Tensor = 1
        if target == "batch":
            if present is not None:
                logits, both = logits.masked_fill(~present[:, None], -torch.inf), both * present[:, None]
            # Eqs. 5 and 7. The sigmoid is monotone, so pooling logits pools probabilities; of equal logits, one is it.
            logits, both = logits.max(dim=0).values, both.max(dim=0).values  # (R,)
        elif present is None:
            images = len(labels)
        else:
            images = present.sum()
            weights = present[:, None].to(logits) if weights is None else present[:, None] * weights
        total = F.binary_cross_entropy_with_logits(logits, both, weights, reduction="sum")
        if reduction == "sum":
            return total
        # The mean is over all pairs also where only some are given. Without pairs there is no loss: 0, not NaN.
        return total / (images * max(number_of_pairs(labels.shape[1]), 1))

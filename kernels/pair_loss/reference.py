"""Losses over label pairs: the Soft Pairwise Co-occurrence Loss (paper eqs. 5 to 8) and its sample-level form."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..precision import no_autocast
from ..similarity import similarity_logits
from ..text_tower.sequences import pair_indices


def pair_loss(
    pair_features: Tensor,
    image_vectors: Tensor,
    logit_scale: Tensor,
    labels: Tensor,
    *,
    target: str = "batch",
    reduction: str = "sum",
) -> Tensor:
    """Binary cross-entropy of pair logits; arguments and result as `op.pair_loss`."""
    logits = similarity_logits(image_vectors, pair_features, logit_scale)  # (B,P)
    with no_autocast(logits):
        both = sample_targets(labels).to(logits.dtype)  # (B,P)
        if target == "batch":
            # Eqs. 5 and 7. The sigmoid is monotone, so pooling logits pools probabilities; of equal logits, one is it.
            logits, both = logits.max(dim=0).values, both.max(dim=0).values  # (P,)
        total = F.binary_cross_entropy_with_logits(logits, both, reduction="sum")
        # Without pairs there is no loss: 0, not NaN.
        return total if reduction == "sum" else total / max(logits.numel(), 1)


def sample_targets(labels: Tensor) -> Tensor:
    """(B,P) bool: image b carries both labels of pair (i,j). Uncertain (-1) labels count as absent."""
    positive = labels == 1
    first, second = pair_indices(labels.shape[1], labels.device)
    return positive[:, first] & positive[:, second]

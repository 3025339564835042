"""Asymmetric Loss (Ridnik et al. 2021) as PsPG uses it: on the softmax over a class's positive and negative logit."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import at_least_fp32, no_autocast


def asymmetric_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    gamma_positive: float = 1.0,
    gamma_negative: float = 2.0,
    clip: float = 0.05,
    eps: float = 1e-6,
    reduction: str = "sum",
) -> Tensor:
    """Asymmetric loss; arguments and result as `op.asymmetric_loss`."""
    with no_autocast(logits):
        p, p_negative = torch.softmax(at_least_fp32(logits), dim=1).unbind(dim=1)  # (B,C) each
        p_negative = (p_negative + clip).clamp(max=1)
        positive = labels == 1
        p_true = torch.where(positive, p, p_negative)
        gamma = torch.where(positive, gamma_positive, gamma_negative).to(p.dtype)
        focus = (1 - p_true.detach()) ** gamma
        loss = -focus * p_true.clamp(min=eps).log()
        kept = labels >= 0
        total = torch.where(kept, loss, 0).sum()
        return total if reduction == "sum" else total / kept.sum().clamp(min=1)

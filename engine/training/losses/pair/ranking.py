"""Multi-label margin loss (paper, table 2; default of the published code)."""

from __future__ import annotations

import torch
from torch import Tensor

from pspg.kernels.precision import at_least_fp32, no_autocast

from . import PAIR_LOSSES
from ._base import PairInputs, PairLoss


@PAIR_LOSSES.register
class Ranking(PairLoss):
    """`ranking_loss` of the batch."""

    name = "ranking"
    paper_reduction = "mean"
    published_weight = 0.07

    def __call__(self, inputs: PairInputs) -> Tensor:
        every = None if inputs.global_batch is None else inputs.global_batch.labels
        return ranking_loss(inputs.output.logits, inputs.labels, inputs.reduction, every)


def ranking_loss(logits: Tensor, labels: Tensor, reduction: str = "mean", every: Tensor | None = None) -> Tensor:
    """Multi-label margin loss of the batch's flattened positive probabilities; labels of -1 are left out.

    Σ over positive j and negative i of max(0, 1 − (p_j − p_i)). Probabilities differ by at most 1, so the margin is
    always violated and the double sum is N⁻·Σ_j (1 − p_j) + N⁺·Σ_i p_i. `mean` divides by the labels not left out.

    Args:
        logits: (B,2,C).
        labels: (B,C) in {1, 0, -1}.
        reduction: sum or mean.
        every: (M,C) labels of the batch that the B images are a share of; the loss is their part of that batch's.
    """
    every = labels if every is None else every
    with no_autocast(logits):
        p, complement = torch.softmax(at_least_fp32(logits), dim=1).unbind(dim=1)
        positive, negative = (labels == 1).to(p.dtype), (labels == 0).to(p.dtype)
        negatives, positives = (every == 0).to(p.dtype).sum(), (every == 1).to(p.dtype).sum()
        total = negatives * (positive * complement).sum() + positives * (negative * p).sum()
        return total if reduction == "sum" else total / (every >= 0).sum().clamp(min=1)

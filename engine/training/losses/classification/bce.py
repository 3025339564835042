"""Binary cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pspg.kernels.precision import at_least_fp32, no_autocast

from . import CLASSIFICATION_LOSSES
from ._base import ClassificationLoss


@CLASSIFICATION_LOSSES.register
class BinaryCrossEntropy(ClassificationLoss):
    """Plain binary cross-entropy of the class probabilities (paper, table 2)."""

    name = "bce"

    def __call__(self, logits: Tensor, labels: Tensor, *, reduction: str, impl: str) -> Tensor:
        return binary_cross_entropy(logits, labels, reduction)


def binary_cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "sum") -> Tensor:
    """Binary cross-entropy of the softmax over (positive, negative) logits (B,2,C); labels of -1 are left out.

    `mean` is over the labels that are not left out.
    """
    with no_autocast(logits):
        positive, negative = at_least_fp32(logits).unbind(dim=1)
        # The softmax over two logits is the sigmoid of their difference.
        target, kept = (labels == 1).to(positive.dtype), labels >= 0
        loss = F.binary_cross_entropy_with_logits(positive - negative, target, reduction="none")
        total = torch.where(kept, loss, 0).sum()
        return total if reduction == "sum" else total / kept.sum().clamp(min=1)

"""Asymmetric loss (Ridnik et al. 2021), the classification loss of the paper."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pspg.kernels.asymmetric_loss import asymmetric_loss

from . import CLASSIFICATION_LOSSES
from ._base import ClassificationLoss


@CLASSIFICATION_LOSSES.register
class AsymmetricLoss(ClassificationLoss):
    """The operator `asymmetric_loss`."""

    name = "asl"

    def __call__(self, logits: Tensor, labels: Tensor, *, reduction: Any, impl: str) -> Tensor:
        return asymmetric_loss(
            logits,
            labels,
            gamma_positive=self.config.gamma_positive,
            gamma_negative=self.config.gamma_negative,
            clip=self.config.clip,
            reduction=reduction,
            impl="reference" if impl == "eager" else impl,  # there is nothing to save in torch
        )

"""The contract of classification losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from ....config import LossConfig


class ClassificationLoss(ABC):
    """Loss of every class of every image by itself.

    Args:
        config: its settings.
    """

    name: ClassVar[str]
    """value of `loss.classification`"""

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    @abstractmethod
    def __call__(self, logits: Tensor, labels: Tensor, *, reduction: str, impl: str) -> Tensor:
        """Scalar, float32 or better.

        Args:
            logits: (B,2,C), index 0 positive.
            labels: (B,C) in {1, 0, -1}; -1 is left out.
            reduction: sum, or mean over the labels that are not left out.
            impl: implementation of the operator.
        """

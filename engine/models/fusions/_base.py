"""The contract of fusions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn


class Fusion(nn.Module, ABC):
    """Logits of images for classes whose text features are known."""

    name: ClassVar[str]
    """value of `model.fusion`"""
    scale: ClassVar[float] = 1 / 0.07
    """inverse temperature to start from"""
    trains_temperature: ClassVar[bool] = True
    image_vector: ClassVar[bool] = True
    """there is one vector an image, as pair losses need"""
    method: ClassVar[str] = "PsPG"
    """name of the method in reports, if the decoder says the same"""
    published: ClassVar[bool] = True
    """it has a place in the published layout"""

    @abstractmethod
    def class_logits(
        self, logit_scale: Tensor, tokens: Tensor, positive: Tensor, negative: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of B images for C classes.

        Args:
            logit_scale: scalar, log of the inverse temperature.
            tokens: (B,S,D), token 0 global.
            positive, negative: (C,D) unit text features of each side, float32 or better.

        Returns:
            (B,2,C), index 0 positive, and the fused image vectors (B,D) if there are any; float32 or better.
        """

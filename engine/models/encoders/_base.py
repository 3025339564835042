"""The contract of image encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn


class ImageEncoder(nn.Module, ABC):
    """The image side of a CLIP. Phase 1 trains it, phase 2 freezes it, as open_clip's.

    Args:
        width: D, the joint embedding width.
        config: `vision_cfg` of the backbone's JSON file, with whatever keys the encoder reads; `image_size` is the side
            of its input in pixels.
    """

    name: ClassVar[str]
    """value of `vision_cfg.encoder`"""

    def __init__(self, width: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.image_size = int(config["image_size"])

    @abstractmethod
    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Global features (B,D) and local tokens (B,S−1,D), neither normalised, of images (B,3,h,w).

        Maps need a square grid of local tokens, row by row; a class's logit compares each of them with its text
        feature, so they belong to the same space as the global feature.
        """

    def forward(self, images: Tensor) -> Tensor:
        """Global features (B,D), which phase 1 trains."""
        return self.tokens(images)[0]

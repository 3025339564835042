"""The global token alone."""

import torch.nn.functional as F
from torch import Tensor

from . import FUSIONS
from ._spatial import SpatialFusion


@FUSIONS.register
class GlobalOnly(SpatialFusion):
    """x̂_0."""

    name = "global"

    def fuse(self, tokens: Tensor) -> Tensor:
        return F.normalize(tokens[:, 0], dim=-1)

"""Global and local tokens without a gate."""

import torch.nn.functional as F
from torch import Tensor

from . import FUSIONS
from ._spatial import SpatialFusion


@FUSIONS.register
class Ungated(SpatialFusion):
    """Σ_s x̂_s."""

    name = "ungated"

    def fuse(self, tokens: Tensor) -> Tensor:
        return F.normalize(tokens, dim=-1).sum(dim=1)

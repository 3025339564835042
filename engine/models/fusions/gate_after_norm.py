"""Spatial Fusion whose gate acts: tokens are normalised before it."""

import torch.nn.functional as F
from torch import Tensor

from . import FUSIONS
from ._spatial import SpatialFusion


@FUSIONS.register
class GateAfterNorm(SpatialFusion):
    """Σ_s g_s·x̂_s."""

    name = "gate_after_norm"
    trains_gate = True

    def fuse(self, tokens: Tensor) -> Tensor:
        return (self.gate(tokens)[..., None] * F.normalize(tokens, dim=-1)).sum(dim=1)

"""Spatial Fusion in the published order (eqs. 1 and 6 to the letter): the gate cancels."""

import torch.nn.functional as F
from torch import Tensor

from . import FUSIONS
from ._spatial import SpatialFusion


@FUSIONS.register
class GateBeforeNorm(SpatialFusion):
    """Σ_s (g_s·x_s)/‖g_s·x_s‖; the gradient of the gate is zero but for rounding."""

    name = "gate_before_norm"
    trains_gate = True

    def fuse(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.gate(tokens)[..., None] * tokens, dim=-1).sum(dim=1)

"""Class-specific region features of DualCoOp (Sun et al. 2022): every class looks at its own places of an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pspg.kernels.precision import at_least_fp32, no_autocast

from . import FUSIONS
from ._base import Fusion

SHARPNESS = 20.0
"""inverse temperature of the softmax over places (Sun et al. 2022)"""
SCALE = 100.0
"""scale of the logits: the similarities that are pooled are scaled by 20, and the result by 5 (Sun et al. 2022)"""


@FUSIONS.register
class Regions(Fusion):
    """Local tokens pooled for each class by itself; no parameters, a constant temperature, no vector an image."""

    name = "regions"
    scale = SCALE
    trains_temperature = False
    image_vector = False
    method = "DualCoOp"
    published = False

    def class_logits(
        self, logit_scale: Tensor, tokens: Tensor, positive: Tensor, negative: Tensor
    ) -> tuple[Tensor, None]:
        return region_logits(tokens[:, 1:], positive, negative), None


def region_logits(local: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Logits of an image's local tokens, pooled for each class where its positive prompt fits best.

    With the cosine z±_s of place s and the two prompts of class c, and weights w = softmax_s(20·z⁺) for both signs:
    logit± = 100·Σ_s w_s·z±_s. That takes S·C numbers an image; the features pooled for each class never exist.

    Args:
        local: (B,S,D) raw local tokens, the global one is not among them.
        positive, negative: (C,D), unit norm, float32 or better.

    Returns:
        (B,2,C), index 0 positive; float32 or better.
    """
    with no_autocast(local):
        local = F.normalize(at_least_fp32(local), dim=-1)
        sides = [local @ texts.T for texts in (positive, negative)]  # (B,S,C)
        weights = torch.softmax(SHARPNESS * sides[0], dim=1)
        return SCALE * torch.stack([(weights * side).sum(dim=1) for side in sides], dim=1)

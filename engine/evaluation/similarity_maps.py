"""Similarity maps: where an image resembles a class, by the log-odds of its local tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pspg.kernels.precision import at_least_fp32
from pspg.kernels.similarity import similarity_logits

from ..utils.errors import UserError


@torch.no_grad()
def similarity_maps(
    tokens: Tensor, positive: Tensor, negative: Tensor, logit_scale: Tensor, *, blend: Tensor | None = None
) -> Tensor:
    """Logit difference of each local token: exp(logit_scale) · x̂_s·(ŵ⁺ − ŵ⁻), the log-odds of that token alone.

    Summed over positions, and with the global token's, these are an image's log-odds under fusion `ungated`; they leave
    out the gate's weights.

    Args:
        tokens: (B,S,D), token 0 global, the others a square grid, row by row.
        positive, negative: (C,D) text features.
        logit_scale: scalar, log of the inverse temperature.
        blend: (C,D), as `blended` takes it. An image's counts once, not once for each of S tokens: a token has 1/S.

    Returns:
        (B,C,g,g) with g² = S − 1, float32 or better.

    Raises:
        UserError: the tokens are no square grid.
    """
    side = math.isqrt(tokens.shape[1] - 1)
    if side == 0 or side**2 != tokens.shape[1] - 1:
        raise UserError(f"maps: the backbone's {tokens.shape[1] - 1} local tokens are no square grid; leave maps out")
    local = F.normalize(at_least_fp32(tokens[:, 1:]), dim=-1)
    shown, against = (similarity_logits(local.flatten(0, 1), text, logit_scale) for text in (positive, negative))
    odds = shown - against
    if blend is not None:
        odds = odds + local.flatten(0, 1).to(blend.dtype) @ blend.T / tokens.shape[1]
    return odds.view(len(tokens), side, side, -1).permute(0, 3, 1, 2)

"""CLIP's contrastive loss (phase 1), of one process or of several that share a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pspg.kernels.precision import at_least_fp32, no_autocast

from ...distributed.collectives import all_gather_rows, average_gradient, rank

MAX_LOGIT_SCALE = math.log(100)


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, counts: Sequence[int] | None = None
) -> Tensor:
    """CLIP's symmetric InfoNCE of B matching images and texts (phase 1).

    The temperature is capped here, at exp(logit_scale) = 100: beyond the cap the value stays and only gradients that
    bring it back pass, which is what clamping the parameter after every step does.

    Args:
        image_features: (B,D), any norm.
        text_features: (B,D), any norm; row b belongs to image b.
        logit_scale: scalar, log of the inverse temperature.
        counts: images of every rank, where all of them are one batch, this rank's B among them. The result is the B
            rows' part of that batch's loss: parts add up. None: B is all there is.

    Returns:
        Mean of the image-to-text and text-to-image cross-entropies, float32 or better.
    """
    with no_autocast(image_features):
        images = F.normalize(at_least_fp32(image_features), dim=-1)
        texts = F.normalize(at_least_fp32(text_features), dim=-1)
        scale = _Capped.apply(at_least_fp32(logit_scale))
        if counts is not None:
            return _own_rows(images, texts, scale, counts)
        logits = scale.exp() * images @ texts.T
        return (_cross_entropies(logits) + _cross_entropies(logits.T)) / (2 * len(logits))


def _own_rows(images: Tensor, texts: Tensor, scale: Tensor, counts: Sequence[int]) -> Tensor:
    """This rank's rows of both directions: B against all M, twice, in place of M against M."""
    # The cap judges the gradient of the whole loss, so ranks average it on the way there.
    scale = average_gradient(scale).exp()
    first, total = sum(counts[: rank()]), sum(counts)
    image_rows = _cross_entropies(scale * images @ all_gather_rows(texts, counts).T, first)
    text_rows = _cross_entropies(scale * texts @ all_gather_rows(images, counts).T, first)
    return (image_rows + text_rows) / (2 * total)


def _cross_entropies(logits: Tensor, first: int = 0) -> Tensor:
    """Sum over rows b of the cross-entropy whose target is column first + b.

    Written out, as torch's own (NLLLoss) is not deterministic on a GPU.
    """
    return (logits.logsumexp(dim=1) - logits.diagonal(first)).sum()


class _Capped(torch.autograd.Function):
    """min(x, ln 100); a gradient that would raise x further is dropped at the cap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x >= MAX_LOGIT_SCALE)
        return x.clamp(max=MAX_LOGIT_SCALE)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (capped,) = ctx.saved_tensors
        return torch.where(capped & (gradient < 0), 0, gradient)

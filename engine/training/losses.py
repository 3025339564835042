"""The paper's loss combinations, from the operators in `pspg.kernels`; nothing here waits for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pspg.kernels.asymmetric_loss import asymmetric_loss
from pspg.kernels.precision import at_least_fp32, no_autocast
from pspg.kernels.spcl import PairSample, spcl
from pspg.kernels.text_tower import TextTower

from ..config import LossConfig
from ..distributed.collectives import all_gather_rows, average_gradient, rank
from ..models.prompts import Vocabulary
from ..models.pspg import PsPGOutput

Reduction = Literal["sum", "mean"]
MAX_LOGIT_SCALE = math.log(100)


class Whole(NamedTuple):
    """The batch that a rank has a share of. The loss is then the rank's part of the whole one: parts add up."""

    labels: Tensor
    """(M,C) of all images"""
    pairs: tuple[int, int]
    """start and stop of the pairs (of all, or of those sampled) that this rank takes"""


def prompt_loss(
    output: PsPGOutput,
    labels: Tensor,
    tower: TextTower,
    vocabulary: Vocabulary,
    config: LossConfig,
    *,
    sample: PairSample | None = None,
    whole: Whole | None = None,
    memory: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of phase 2: classification part + pair part (paper eq. 9).

    Args:
        output: of the head, for B images.
        labels: (B,C) in {1, 0, -1}. -1 is left out of classification and ranking, and counts as 0 in label pairs.
        config: losses, weights and reductions; nulls are filled from its preset.
        sample: pairs that SPCL or PCL is estimated from; None: all.
        whole: what the B images are a share of; `output.image_vectors` are then those of all M. None: B is all.
        memory, impl: as in `spcl`; `impl` picks the form of the asymmetric loss, too.

    Returns:
        Weighted sum, and the detached unweighted parts `classification` and, if any, `pair`.

    Raises:
        ValueError: SPCL or PCL of an output without image vectors.
    """
    config = config.resolved()
    assert config.classification_weight is not None
    assert config.pair_weight is not None
    assert config.classification_reduction is not None
    assert config.pair_reduction is not None
    reduction = config.classification_reduction if whole is None else "sum"
    if config.classification == "asl":
        classification = asymmetric_loss(
            output.logits,
            labels,
            gamma_positive=config.gamma_positive,
            gamma_negative=config.gamma_negative,
            clip=config.clip,
            reduction=reduction,
            impl="reference" if impl == "eager" else impl,  # there is nothing to save in torch
        )
    else:
        classification = binary_cross_entropy(output.logits, labels, reduction)
    if whole is not None and config.classification_reduction == "mean":
        classification = classification / (whole.labels >= 0).sum().clamp(min=1)
    total = config.classification_weight * classification
    parts = {"classification": classification.detach()}
    if config.pair == "none":
        return total, parts
    if config.pair == "ranking":
        pair = ranking_loss(output.logits, labels, config.pair_reduction, None if whole is None else whole.labels)
    elif output.image_vectors is None:
        raise ValueError(f"{config.pair}: the output has no image vectors to compare pairs with")
    else:
        pair = spcl(
            tower,
            vocabulary.frame,
            output.positive_prompts,
            output.image_vectors,
            output.logit_scale,
            labels if whole is None else whole.labels,
            target="batch" if config.pair == "spcl" else "sample",
            reduction=config.pair_reduction,
            prefixes=output.prefixes,
            sample=sample,
            part=None if whole is None else whole.pairs,
            memory=memory,
            impl=impl,
        )
    return total + config.pair_weight * pair, {**parts, "pair": pair.detach()}


def binary_cross_entropy(logits: Tensor, labels: Tensor, reduction: Reduction = "sum") -> Tensor:
    """Binary cross-entropy of the softmax over (positive, negative) logits (B,2,C); labels of -1 are left out.

    `mean` is over the labels that are not left out.
    """
    with no_autocast(logits):
        positive, negative = at_least_fp32(logits).unbind(dim=1)
        # The softmax over two logits is the sigmoid of their difference.
        target = (labels == 1).to(positive.dtype)
        loss = F.binary_cross_entropy_with_logits(positive - negative, target, reduction="none")
        return _reduce(loss, labels >= 0, reduction)


def ranking_loss(logits: Tensor, labels: Tensor, reduction: Reduction = "mean", whole: Tensor | None = None) -> Tensor:
    """Multi-label margin loss of the batch's flattened positive probabilities; labels of -1 are left out.

    Σ over positive j and negative i of max(0, 1 − (p_j − p_i)). Probabilities differ by at most 1, so the margin is
    always violated and the double sum is N⁻·Σ_j (1 − p_j) + N⁺·Σ_i p_i. `mean` divides by the labels not left out.

    Args:
        logits: (B,2,C).
        labels: (B,C) in {1, 0, -1}.
        whole: (M,C) labels of the batch that the B images are a share of; the loss is their part of that batch's.
    """
    every = labels if whole is None else whole
    with no_autocast(logits):
        p, complement = torch.softmax(at_least_fp32(logits), dim=1).unbind(dim=1)
        positive, negative = (labels == 1).to(p.dtype), (labels == 0).to(p.dtype)
        negatives, positives = (every == 0).to(p.dtype).sum(), (every == 1).to(p.dtype).sum()
        total = negatives * (positive * complement).sum() + positives * (negative * p).sum()
        return total if reduction == "sum" else total / (every >= 0).sum().clamp(min=1)


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
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _own_rows(images: Tensor, texts: Tensor, scale: Tensor, counts: Sequence[int]) -> Tensor:
    """This rank's rows of both directions: B against all M, twice, in place of M against M."""
    # The cap judges the gradient of the whole loss, so ranks average it on the way there.
    scale = average_gradient(scale).exp()
    first, total = sum(counts[: rank()]), sum(counts)
    target = torch.arange(first, first + len(images), device=images.device)
    image_rows = F.cross_entropy(scale * images @ all_gather_rows(texts, counts).T, target, reduction="sum")
    text_rows = F.cross_entropy(scale * texts @ all_gather_rows(images, counts).T, target, reduction="sum")
    return (image_rows + text_rows) / (2 * total)


def _reduce(loss: Tensor, kept: Tensor, reduction: Reduction) -> Tensor:
    total = torch.where(kept, loss, 0).sum()
    return total if reduction == "sum" else total / kept.sum().clamp(min=1)


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

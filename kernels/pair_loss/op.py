"""The public function of the pair losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ..dispatch import check_shapes, resolve, with_triton
from ..pairs import number_of_pairs, pair_indices
from . import reference


def pair_loss(
    pair_features: Tensor,
    image_vectors: Tensor,
    logit_scale: Tensor,
    labels: Tensor,
    *,
    pairs: tuple[Tensor, Tensor] | None = None,
    weights: Tensor | None = None,
    present: Tensor | None = None,
    target: Literal["batch", "sample"] = "batch",
    reduction: Literal["sum", "mean"] = "sum",
    impl: str = "auto",
) -> Tensor:
    """SPCL (`target="batch"`, paper eqs. 5 to 8) or PCL (`target="sample"`), in float32 or better.

    SPCL: q_ij = 1 if any image carries both labels, the pair's logit is the largest over the batch, and their binary
    cross-entropy is reduced over P pairs. PCL: no pooling; every image's own target and logit, reduced over B·P.

    A pair's loss depends on its own feature alone, so the losses of parts of the pairs add up to the whole one, under
    either reduction: the mean is always over all P (or B·P).

    Args:
        pair_features: (R,D) text features of the prompts of `pairs`, any norm.
        image_vectors: (B,D) fused image vectors.
        logit_scale: scalar, log of the inverse temperature.
        labels: (B,C) in {1, 0, -1}; -1 counts as 0.
        pairs: classes i and j of R pairs, int64 (R,) each; None: all P, i < j row-major.
        weights: (R,) factors of the pairs' losses; None: ones.
        present: (B,) bool, images that count, one at least; the others are as if they were not there, and nothing of
            this is read on the host. None: all.
        target: batch (SPCL) or sample (PCL).
        reduction: sum or mean. No pairs (C < 2): 0.
        impl: triton (SPCL only; chosen by auto on a GPU), reference, or auto.

    Returns:
        Scalar.

    Raises:
        ValueError: shapes or arguments that do not fit, or an `impl` that cannot run.
    """
    available: dict[str, Callable[..., Tensor]] = {"reference": reference.pair_loss}
    if target == "batch":
        available = with_triton(available, _with_kernels, pair_features)
    run = resolve(impl, available)
    if target not in ("batch", "sample") or reduction not in ("sum", "mean"):
        raise ValueError(f"pair_loss: no target {target!r} with reduction {reduction!r}")
    first, second = pair_indices(labels.shape[-1], labels.device) if pairs is None else pairs
    given = {"weights": (weights, "R"), "present": (present, "B")}
    sizes = check_shapes(
        "pair_loss",
        pair_features=(pair_features, "R D"),
        image_vectors=(image_vectors, "B D"),
        labels=(labels, "B C"),
        **{name: (tensor, form) for name, (tensor, form) in given.items() if tensor is not None},
    )
    if sizes["R"] != len(first):
        which = (
            f"{sizes['C']} classes have {number_of_pairs(sizes['C'])} pairs" if pairs is None else f"{len(first)} pairs"
        )
        raise ValueError(f"pair_loss: {which}, got {sizes['R']} features")
    return run(
        pair_features,
        image_vectors,
        logit_scale,
        labels,
        first,
        second,
        weights,
        present=present,
        target=target,
        reduction=reduction,
    )


def stand_ins(image_vectors: Tensor, labels: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Image vectors and labels with those of an image that counts in the place of the others': no maximum changes."""
    own = torch.arange(len(present), device=present.device)
    rows = torch.where(present, own, present.int().argmax())
    return image_vectors[rows], labels[rows]


def _with_kernels(
    pair_features: Tensor, vectors: Tensor, scale: Tensor, labels: Tensor, *pairs: Any, present: Any, **options: Any
) -> Tensor:
    from .triton import pair_loss  # imports triton

    if present is not None:
        vectors, labels = stand_ins(vectors, labels, present)
    return pair_loss(pair_features, vectors, scale, labels, *pairs, **options)

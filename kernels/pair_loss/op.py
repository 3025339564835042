"""Public form of the pair losses."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..dispatch import check_shapes, resolve
from . import reference


def pair_loss(
    pair_features: Tensor,
    image_vectors: Tensor,
    logit_scale: Tensor,
    labels: Tensor,
    *,
    target: Literal["batch", "sample"] = "batch",
    reduction: Literal["sum", "mean"] = "sum",
    impl: str = "auto",
) -> Tensor:
    """SPCL (`target="batch"`, paper eqs. 5 to 8) or PCL (`target="sample"`), in float32 or better.

    SPCL: q_ij = 1 if any image carries both labels, the pair's logit is the largest over the batch, and their binary
    cross-entropy is reduced over P pairs. PCL: no pooling; every image's own target and logit, reduced over B·P.

    Args:
        pair_features: (P,D) text features of the pair prompts, any norm, pairs i < j row-major.
        image_vectors: (B,D) fused image vectors.
        logit_scale: scalar, log of the inverse temperature.
        labels: (B,C) in {1, 0, -1}; -1 counts as 0.
        target: batch (SPCL) or sample (PCL).
        reduction: sum or mean. No pairs (C < 2): 0.
        impl: auto or reference.

    Returns:
        Scalar.

    Raises:
        ValueError: shapes or arguments that do not fit, or an `impl` that cannot run.
    """
    run = resolve(impl, {"reference": reference.pair_loss})
    if target not in ("batch", "sample") or reduction not in ("sum", "mean"):
        raise ValueError(f"pair_loss: no target {target!r} with reduction {reduction!r}")
    sizes = check_shapes(
        "pair_loss",
        pair_features=(pair_features, "P D"),
        image_vectors=(image_vectors, "B D"),
        labels=(labels, "B C"),
    )
    classes = sizes["C"]
    if sizes["P"] != classes * (classes - 1) // 2:
        raise ValueError(f"pair_loss: {classes} classes have {classes * (classes - 1) // 2} pairs, got {sizes['P']}")
    return run(pair_features, image_vectors, logit_scale, labels, target=target, reduction=reduction)

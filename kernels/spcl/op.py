"""Public form of the pair loss of prompts."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..dispatch import check_shapes, resolve
from ..pair_loss import pair_loss
from ..text_tower import Frame, TextTower, encode_pairs
from . import reference


def pair_features(tower: TextTower, frame: Frame, prompts: Tensor, *, impl: str = "auto") -> Tensor:
    """(P,D) text features, not normalised, of the pair prompts of `prompts` (C,n,W), pairs i < j row-major.

    Args:
        impl: eager (shared prefixes; not in prefix mode), reference, or auto, the first that can run.

    Raises:
        ValueError: an `impl` that cannot run.
    """
    available = {"eager": encode_pairs, "reference": reference.pair_features}
    if frame.named:
        del available["eager"]
    return resolve(impl, available)(tower, frame, prompts)


def spcl(
    tower: TextTower,
    frame: Frame,
    prompts: Tensor,
    image_vectors: Tensor,
    logit_scale: Tensor,
    labels: Tensor,
    *,
    target: Literal["batch", "sample"] = "batch",
    reduction: Literal["sum", "mean"] = "sum",
    impl: str = "auto",
) -> Tensor:
    """SPCL or PCL of generated prompts (paper eqs. 5 to 8): pair prompts, text tower, pair loss.

    Args:
        tower: frozen text tower.
        frame: constant embeddings around the prompts.
        prompts: (C,n,W) positive prompts.
        image_vectors: (B,D) fused image vectors.
        logit_scale: scalar, log of the inverse temperature.
        labels: (B,C) in {1, 0, -1}; -1 counts as 0.
        target: batch (SPCL) or sample (PCL).
        reduction: sum or mean. No pairs (C < 2): 0, with zero gradients.
        impl: as `pair_features`.

    Returns:
        Scalar, float32 or better.

    Raises:
        ValueError: shapes that do not fit, or an `impl` that cannot run.
    """
    check_shapes(
        "spcl",
        prompts=(prompts, "C n W"),
        suffix=(frame.suffix, "C K W"),
        projection=(tower.projection, "W D"),
        image_vectors=(image_vectors, "B D"),
        labels=(labels, "B C"),
    )
    features = pair_features(tower, frame, prompts, impl=impl)
    return pair_loss(features, image_vectors, logit_scale, labels, target=target, reduction=reduction)

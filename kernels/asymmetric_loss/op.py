"""The public function of the asymmetric loss."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ..dispatch import check_shapes, resolve, with_triton
from . import reference


def asymmetric_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    gamma_positive: float = 1.0,
    gamma_negative: float = 2.0,
    clip: float = 0.05,
    eps: float = 1e-6,
    reduction: Literal["sum", "mean"] = "sum",
    impl: str = "auto",
) -> Tensor:
    """Asymmetric loss, in float32 or better.

    With p, 1 − p the softmax over (positive, negative) logits and p_m = min(1, 1 − p + clip): −(1 − p)^γ⁺ log p where
    the label is 1, −(1 − p_m)^γ⁻ log p_m where it is 0. The focusing factor is taken as constant; logarithms are of at
    least eps.

    Args:
        logits: (B,2,C), index 0 positive.
        labels: (B,C) in {1, 0, -1}; -1 is left out.
        gamma_positive, gamma_negative: γ⁺, γ⁻.
        clip: probability shift of negatives.
        eps: smallest probability whose logarithm is taken.
        reduction: sum, or mean over the labels that are not left out (0 if none is).
        impl: triton (one pass; chosen by auto on a GPU), reference, or auto.

    Returns:
        Scalar.

    Raises:
        ValueError: shapes or arguments that do not fit, or an `impl` that cannot run.
    """
    run = resolve(impl, with_triton({"reference": reference.asymmetric_loss}, _with_kernel, logits))
    if reduction not in ("sum", "mean"):
        raise ValueError(f"asymmetric_loss: no reduction {reduction!r}")
    check_shapes("asymmetric_loss", logits=(logits, "B 2 C"), labels=(labels, "B C"))
    return run(
        logits,
        labels,
        gamma_positive=gamma_positive,
        gamma_negative=gamma_negative,
        clip=clip,
        eps=eps,
        reduction=reduction,
    )


def _with_kernel(*arguments: Any, **options: Any) -> Tensor:
    from .triton import asymmetric_loss  # imports triton

    return asymmetric_loss(*arguments, **options)

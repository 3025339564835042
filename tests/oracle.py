"""The tolerance of kernels: the error that torch makes in the same dtype, element by element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOCAL = 2.0
"""times eager's own error at the element"""
TYPICAL = 6.0
"""times eager's typical error there: `_typical`"""
FEW = 16
"""shorter rows say nothing of a typical error"""
ROUNDINGS = 4.0
"""tolerance of float32, for sums in another order; the result's own rounding to its dtype comes on top"""


def no_worse(kernel: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Hold every element of a kernel's results to the error of eager ones in the same dtype.

    An element may be off by `LOCAL` times eager's error there, and by the roundings of its own magnitude. Eager's error
    at one element can be small by luck, where a result happens to be representable or errors cancel, so `TYPICAL` times
    its typical error comes on top. That is a root mean square: a single bad element of eager's excuses no other.

    Args:
        kernel: results of kernels.
        eager: those of torch in the same dtype.
        exact: those of torch in float64.

    Raises:
        AssertionError: dtypes or shapes that differ, a number that is not finite, or an error that is too large.
    """
    for number, (got, other, right) in enumerate(zip(kernel, eager, exact, strict=True)):
        assert got.dtype == other.dtype, f"tensor {number}: {got.dtype} against {other.dtype}"
        assert got.shape == other.shape == right.shape, f"tensor {number}: {got.shape} against {right.shape}"
        assert torch.isfinite(got).all(), f"tensor {number}: not finite"
        if not got.numel():
            continue
        right = right.to(got.device, torch.float64)
        error, usual = ((tensor.to(right) - right).abs() for tensor in (got, other))
        rounding = torch.finfo(got.dtype).eps + ROUNDINGS * torch.finfo(torch.float32).eps
        excess = error - (LOCAL * usual + rounding * right.abs() + TYPICAL * _typical(usual, got.dtype))
        if (excess > 0).any():
            worst = torch.unravel_index(excess.argmax(), excess.shape)
            raise AssertionError(
                f"tensor {number}: {int((excess > 0).sum())} of {excess.numel()} elements are too far off; the worst, "
                f"{tuple(map(int, worst))}, by {error[worst]:.3g}, eager's by {usual[worst]:.3g}, of {right[worst]:.3g}"
            )


def no_worse_in_norm(kernel: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor], slack: float) -> None:
    """Hold what many operators make one after the other to twice eager's error, tensor by tensor.

    Steps that feed one another amplify single roundings, so that elements say little.

    Args:
        slack: allowed on top, in proportion to the exact result.

    Raises:
        AssertionError: dtypes that differ, or an error that is too large.
    """
    for number, (got, other, right) in enumerate(zip(kernel, eager, exact, strict=True)):
        assert got.dtype == other.dtype, f"tensor {number}: {got.dtype} against {other.dtype}"
        right = right.to(got.device, torch.float64)
        error, usual = ((tensor.to(right) - right).norm() for tensor in (got, other))
        assert error <= 2 * usual + slack * right.norm(), f"tensor {number}: off by {error:.3g}, eager by {usual:.3g}"


def _typical(usual: Tensor, dtype: torch.dtype) -> Tensor:
    """Root mean square of eager's errors: over an element's row (the last dimension), or over the tensor.

    Rows differ in magnitude, and a small row's errors must not hide behind a large one's. But few numbers are no
    statistics; and in float32, where little else is rounded, errors come from terms that cancel, in eager's rows and in
    the kernel's not in the same ones: there it is the larger of the two.
    """
    square = usual.square()
    tensor = square.mean().sqrt()
    if square.dim() == 0 or square.shape[-1] < FEW:
        return tensor
    row = square.mean(-1, keepdim=True).sqrt()
    return torch.maximum(row, tensor) if dtype == torch.float32 else row

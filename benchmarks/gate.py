"""No number of a form that is wrong: outputs and gradients against the literal equations in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

ELEMENT, NORM, ROUNDINGS = 4.0, 2.0, 4.0
"""how often the baseline's largest error, and the norm of its error, a form may reach, and the roundings on top"""


def ratios(found: Mapping[str, Sequence[Tensor]], expected: Sequence[Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Error of each form over what it is allowed; above 1 it is wrong, and what is not finite is infinitely so.

    The first form is the baseline: an honest evaluation in the same dtype. Its error, over all tensors together, may be
    the square root of the dtype's rounding; that of the others, tensor by tensor and element by element, a few times
    the baseline's.

    Args:
        found: form → outputs and gradients.
        expected: the same in float64.
        dtype: that the forms compute in.
    """
    rounding = torch.finfo(dtype).eps
    exact = [tensor.double() for tensor in expected]
    errors = {name: [_error(a, b) for a, b in zip(got, exact, strict=True)] for name, got in found.items()}
    sizes = [tensor.norm() for tensor in exact]
    result: dict[str, float] = {}
    baseline: list[Tensor] = []
    for name, error in errors.items():
        if not baseline:
            baseline = error
            whole = torch.stack([e.norm() for e in error]).norm() / torch.stack(sizes).norm().clamp(min=1e-300)
            result[name] = _number(whole / rounding**0.5)
            continue
        worst = torch.zeros((), dtype=torch.float64)
        for e, b, right, size in zip(error, baseline, exact, sizes, strict=True):
            largest = right.abs().max() if right.numel() else right.new_zeros(())
            by_element = _over(e.abs().amax(), ELEMENT * b.abs().amax() + ROUNDINGS * rounding * largest)
            by_norm = _over(e.norm(), NORM * b.norm() + ROUNDINGS * rounding * size)
            worst = torch.stack([worst, by_element.cpu(), by_norm.cpu()]).max()
        result[name] = _number(worst)
    return result


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN, so that an element nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _error(got: Tensor, right: Tensor) -> Tensor:
    if got.shape != right.shape:
        return torch.full((1,), torch.inf, dtype=torch.float64, device=right.device)
    error = got.to(right.device).double() - right
    return error if error.numel() else error.new_zeros(1)


def _over(error: Tensor, allowed: Tensor) -> Tensor:
    """0/0 is 0: an exact zero that was met exactly."""
    return torch.where(error == 0, 0.0, error / allowed)


def _number(value: Tensor) -> float:
    found = float(value)
    return found if found == found else float("inf")

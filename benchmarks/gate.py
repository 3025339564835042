"""No number of an implementation that is wrong: outputs and gradients against an oracle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

ELEMENT, NORM, ROUNDINGS = 4.0, 2.0, 4.0
"""times the baseline's largest error, and times the norm of its error, that is allowed, and the roundings on top"""
PART = 4.0
"""times what a group is allowed that each of its parts may be off by: small parts round worse, and must not be lost"""

Outcome = Mapping[str, Mapping[str, Tensor]]
"""what a step computes: group → part → tensor, such as gradients → name of a parameter → its gradient"""


def ratios(found: Mapping[str, Sequence[Tensor]], expected: Sequence[Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Error of each implementation over what it is allowed; above 1 it is wrong, and NaN or inf is infinitely so.

    The first one is the baseline: an honest evaluation in the same dtype. Its error, over all tensors together, may be
    the square root of the dtype's rounding; that of the others, tensor by tensor and element by element, a few times
    the baseline's.

    Args:
        found: implementation → outputs and gradients.
        expected: the same in float64.
        dtype: that the implementations compute in.
    """
    rounding = torch.finfo(dtype).eps
    exact = [tensor.double() for tensor in expected]
    errors = {name: [_error(a, b) for a, b in zip(got, exact, strict=True)] for name, got in found.items()}
    result: dict[str, float] = {}
    baseline: list[Tensor] = []
    for name, error in errors.items():
        if not baseline:
            baseline = error
            size = torch.stack([tensor.norm() for tensor in exact]).norm().clamp(min=1e-300)
            worst = torch.stack([e.norm() for e in error]).norm() / size / rounding**0.5
        else:
            shares = []
            for e, b, right in zip(error, baseline, exact, strict=True):
                largest = right.abs().max() if right.numel() else right.new_zeros(())
                shares.append(_over(e.abs().amax(), ELEMENT * b.abs().amax() + ROUNDINGS * rounding * largest))
                shares.append(_over(e.norm(), NORM * b.norm() + ROUNDINGS * rounding * right.norm()))
            worst = torch.stack([share.cpu() for share in shares]).max()
        result[name] = float(worst.nan_to_num(torch.inf, torch.inf))
    return result


def excess(found: Outcome, expected: Outcome, dtype: torch.dtype) -> tuple[float, str]:
    """The largest error of a step over what it may be, and what it is an error of; above 1 the outcomes differ.

    The error of a group is relative, in the norm of all its parts together, and may be √eps of the dtype; that of each
    part alone may be `PART` times as large. What is missing or not finite is infinitely wrong.
    """
    allowed = torch.finfo(dtype).eps ** 0.5
    worst, what = 0.0, "nothing"
    if found.keys() != expected.keys():
        return float("inf"), "their kinds"
    for group, parts in expected.items():
        if found[group].keys() != parts.keys():
            return float("inf"), f"the list of {group}"
        apart = {name: (found[group][name].double() - part.double()).norm() for name, part in parts.items()}
        size = {name: part.double().norm() for name, part in parts.items()}
        errors = {f"{group} {name}": _over(apart[name], PART * allowed * size[name]) for name in parts}
        errors[group] = _over(*(torch.stack(list(each.values())).norm() for each in (apart, size))) / allowed
        for name, error in errors.items():
            value = float(error.nan_to_num(torch.inf, torch.inf))
            if value > worst:
                worst, what = value, name
    return worst, what


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
    """error / allowed, where 0/0 is 0: an exact zero that was met exactly."""
    return torch.where(error == 0, 0.0, error / allowed)

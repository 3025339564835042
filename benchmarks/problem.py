"""What is measured of an operator: its inputs, its implementations, its outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pspg.kernels.text_tower import PromptTemplate, TextTower

from .harness import Sizes


@dataclass(frozen=True)
class Problem:
    """Inputs of an operator."""

    leaves: tuple[Tensor, ...]
    """those whose gradients are asked for"""
    fixed: tuple[Any, ...] = ()
    """all others: tensors, towers, templates, or anything that has no floating-point numbers"""

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in a dtype."""
        return Problem(tuple(leaf.to(dtype) for leaf in self.leaves), tuple(_cast(part, dtype) for part in self.fixed))

    def tensors(self) -> Iterator[Tensor]:
        """All that an operator reads."""
        yield from self.leaves
        yield from _tensors(self.fixed)


Function = Callable[[Problem], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Part:
    """Something that can be known of an outcome at a cost that can be borne."""

    problem: Problem
    """what an implementation is run on"""
    expected: list[Tensor]
    """from the literal equations in float64: what `view` leaves of outputs and gradients"""
    view: Callable[[list[Tensor]], list[Tensor]] = lambda outcome: outcome


def whole(literal: Function, problem: Problem, exact: Problem, budget: int) -> list[Part]:
    """Outcome of the literal equations on everything."""
    return [Part(problem, outcome(literal, exact))]


@dataclass(frozen=True)
class Operator:
    """Inputs and implementations of an operator.

    Attributes:
        letters: letter → default size.
        make: problem from torch's random state, in the dtype of what the engine holds in low precision.
        impls: reference, repaired, eager and triton; `compiled` is made of eager. Where there is nothing to tidy, or
            the literal equations repeat no work, names share a function.
        parts: (literal function, problem, the same in float64, FLOPs that may be spent) → what is known of the outcome.
    """

    letters: Mapping[str, int]
    make: Callable[[Sizes, torch.device, torch.dtype], Problem]
    impls: Mapping[str, Function]
    parts: Callable[[Function, Problem, Problem, int], list[Part]] = field(default=whole)


def outcome(function: Function, problem: Problem) -> list[Tensor]:
    """Outputs, and gradients of the sum of their products with fixed random numbers."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in problem.leaves)
    outputs = as_tuple(function(replace(problem, leaves=leaves)))
    return [*(output.detach() for output in outputs), *gradients(outputs, leaves)]


def gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the sum of the outputs times `cotangents`; zero where an output does not depend on a leaf."""
    return torch.autograd.grad(outputs, leaves, cotangents(outputs), materialize_grads=True)


def cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    """One for a scalar, else fixed normal numbers."""
    return [_cotangent(output.shape, output.dtype, output.device) for output in outputs]


@lru_cache(maxsize=8)
def _cotangent(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not shape or device.type == "meta":
        return torch.ones(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs as a tuple, also of one tensor."""
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _cast(part: Any, dtype: torch.dtype) -> Any:
    if isinstance(part, Tensor):
        return part.to(dtype) if part.is_floating_point() else part
    return part.to(dtype) if isinstance(part, TextTower | PromptTemplate) else part


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, tuple | list):
        for one in part:
            yield from _tensors(one)
    elif is_dataclass(part):
        for one in fields(part):
            yield from _tensors(getattr(part, one.name))

"""Whole steps of several providers, measured in turns; no number of one that computes something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from .harness import Call, seconds_of, take_turns
from .rows import FAILED, TOO_LARGE, Row, without_numbers

PART = 4.0
"""times what a group is allowed that each of its parts may be off by: small parts round worse, and must not be lost"""

Outcome = Mapping[str, Mapping[str, Tensor]]
"""what a step computes: group → part → tensor, such as gradients → name of a parameter → its gradient"""


@dataclass(frozen=True)
class Oracle:
    """What a provider must agree with."""

    name: str
    """such as reference (fp32)"""
    outcome: Outcome


class Provider(Protocol):
    """A call of the harness that keeps what its first repetition computed."""

    outcome: Outcome | None
    detail: str
    """what else belongs to its numbers"""

    def __call__(self, turn: int) -> Mapping[str, float]: ...


Prepare = Callable[[], Provider]
FindOracles = Callable[[Mapping[str, Outcome]], Mapping[str, Oracle]]
"""outcomes of the providers that ran → what each of them must agree with"""


class GradientStep:
    """Loss, backward and, if there is one, the optimizer of a module, as a provider.

    Args:
        loss: differentiable scalar.
        module: what trains.
        device: where it runs.
        optimizer: over the module's parameters; None: the step ends with the gradients.
        warm_up: passes before the first repetition, with the weights as they are.
        detail: asked after the first repetition.
    """

    outcome: Outcome | None = None
    detail = ""

    def __init__(
        self,
        loss: Callable[[], Tensor],
        module: nn.Module,
        device: torch.device,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        warm_up: int = 0,
        detail: Callable[[], str] = str,
    ) -> None:
        self._loss, self._module, self._device, self._optimizer = loss, module, device, optimizer
        self._warm_up, self._detail = warm_up, detail

    def __call__(self, turn: int) -> dict[str, float]:
        if turn == 0:
            for _ in range(self._warm_up):
                self._backward()
        torch.manual_seed(turn)
        seconds = seconds_of(self._backward, self._device)
        if turn == 0:
            self.outcome, self.detail = outcome_of(self._value, self._module), self._detail()
        if self._optimizer is not None:
            seconds += seconds_of(self._optimizer.step, self._device)
        return {"both": seconds}

    def _backward(self) -> None:
        self._module.zero_grad(set_to_none=True)
        value = self._loss()
        value.backward()
        self._value = value.detach()


def outcome_of(loss: Tensor, module: nn.Module) -> Outcome:
    """Copies of a loss and of the gradients that its backward left in a module."""
    gradients = {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"loss": {"loss": loss.detach().clone()}, "gradients": gradients}


def excess(found: Outcome, expected: Outcome, dtype: torch.dtype) -> tuple[float, str]:
    """The largest error over what it may be, and what it is an error of; above 1 the outcomes differ.

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
        apart = {name: (found[group][name].double() - part.double()).norm().item() for name, part in parts.items()}
        size = {name: part.double().norm().item() for name, part in parts.items()}
        errors = {f"{group} {name}": _over(apart[name], PART * allowed * size[name]) for name in parts}
        errors[group] = _over(_norm(apart), allowed * _norm(size))
        for name, error in errors.items():
            if not error <= worst:
                worst, what = (error, name) if error == error else (float("inf"), name)
    return worst, what


def measure(
    row: Row,
    prepare: Mapping[str, Prepare],
    oracles: FindOracles,
    device: torch.device,
    without: Mapping[str, str],
    started: Callable[[str], None],
    *,
    dtype: torch.dtype,
    seconds: float | None = None,
) -> list[Row]:
    """A row for every provider, in the order of `prepare`.

    Args:
        row: what the rows share, `direction` included.
        prepare: provider → function that makes it.
        oracles: see `FindOracles`; a provider that it leaves out has nothing to agree with and FAILS.
        without, started, seconds: as in `take_turns` and `Job.run`.
        dtype: that the providers compute in.
    """
    made: dict[str, Provider] = {}

    def make(name: str) -> Callable[[], Call]:
        def prepared() -> Call:
            made[name] = prepare[name]()
            return made[name]

        return prepared

    found = take_turns({name: make(name) for name in prepare if name not in without}, device, started, seconds=seconds)
    outcomes: dict[str, Outcome] = {}
    for name, provider in made.items():
        if found[name].status is None and provider.outcome is not None:
            outcomes[name] = provider.outcome
    expected = oracles(outcomes) if outcomes else {}
    rows: list[Row] = []
    for name in prepare:
        own = replace(row, provider=name)
        if name in without:
            rows.append(without_numbers(own, TOO_LARGE, without[name]))
        elif name in outcomes:
            judged = _judged(replace(own, detail=made[name].detail), outcomes[name], expected.get(name), dtype)
            rows += [judged] if judged.status == FAILED else found[name].rows(judged, (row.direction,))
        else:
            rows += found[name].rows(own, (row.direction,))
    return rows


def _judged(row: Row, found: Outcome, oracle: Oracle | None, dtype: torch.dtype) -> Row:
    if oracle is None:
        return without_numbers(row, FAILED, "nothing to compare with: see the other rows of this case")
    if oracle.outcome is found:
        return replace(row, detail="; ".join(filter(None, ("not compared: the others are, with it", row.detail))))
    error, what = excess(found, oracle.outcome, dtype)
    if error > 1:
        reason = f"{what} off by {error:.3g} times what is allowed, against {oracle.name}"
        return replace(without_numbers(row, FAILED, reason), error=error)
    return replace(row, error=error, detail="; ".join(filter(None, (f"against {oracle.name}", row.detail))))


def _over(error: float, allowed: float) -> float:
    """0/0 is 0: an exact zero that was met exactly."""
    if error == 0:
        return 0.0
    return error / allowed if allowed else float("inf")


def _norm(lengths: Mapping[str, float]) -> float:
    return sum(length**2 for length in lengths.values()) ** 0.5

"""A training step, forward and backward, as one CUDA graph: nothing of Python between its kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


Outcome = tuple[Tensor, dict[str, Tensor], Sequence[Tensor | None]]
"""loss, scalars to log, gradients by the parameters (None: it does not depend on one)"""
Recorder = Callable[[Callable[[], Outcome]], tuple[Callable[[], None], Outcome]]
"""function → replay, and the tensors that every replay writes to"""
WARM_UP = 3
"""ordinary steps before recording: kernels are compiled and libraries have their workspaces by then"""


class Recordable(Protocol):
    """A task whose step can be recorded."""

    module: nn.Module

    def tensors(self, batch: Any) -> dict[str, Tensor] | None:
        """All that a step reads of a batch, by name; None: it reads more than tensors, so it cannot be recorded."""

    def step(self, batch: Any, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and scalars of a batch whose tensors are replaced by others, on the device."""


class StepGraph:
    """Records the step of a task once and replays it for every batch of the same shapes.

    A recording is used only if its first replay gives the loss and gradients of the ordinary step, to the rounding of
    half precision: what a recording gets wrong (an input that is not copied, a value read on the host) is no rounding.

    Args:
        task: the objective; its parameters must stay where they are.
        device: a GPU.
        record: for tests, another way to record.

    Attributes:
        refusal: why there is no recording; None: there is one, or none was tried yet.
    """

    def __init__(self, task: Recordable, device: torch.device, record: Recorder | None = None) -> None:
        self._task, self._device = task, device
        self._record: Recorder = record or _record_on_gpu
        self._parameters = [parameter for parameter in task.module.parameters() if parameter.requires_grad]
        self._inputs: dict[str, Tensor] = {}
        self._replay: Callable[[], None] | None = None
        self._outcome: Outcome | None = None
        self._ordinary_steps = 0
        self.refusal: str | None = None

    def __call__(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Loss, differentiable in the parameters, and detached scalars of a batch; None: take the ordinary step."""
        tensors = None if self.refusal else self._task.tensors(batch)
        if tensors is None:
            return None
        if self._replay is None:
            self._ordinary_steps += 1
            if self._ordinary_steps <= WARM_UP or not self._try(batch, tensors):
                return None
        elif {name: _shape(tensor) for name, tensor in tensors.items()} != {
            name: _shape(tensor) for name, tensor in self._inputs.items()
        }:
            return None
        assert self._replay is not None
        assert self._outcome is not None
        for name, tensor in tensors.items():
            self._inputs[name].copy_(tensor, non_blocking=True)
        self._replay()
        loss, parts, gradients = self._outcome
        found = _Replayed.apply(loss, gradients, *self._parameters)
        return found, {name: part.clone() for name, part in parts.items()}

    def _try(self, batch: Any, tensors: dict[str, Tensor]) -> bool:
        """Record the step; where that fails, say so once and never try again."""
        # Recorded on mirrored pixels and labels, checked on the true ones: what it kept of its own inputs shows.
        self._inputs = {name: tensor.flip(-1).to(self._device, copy=True) for name, tensor in tensors.items()}

        def run() -> Outcome:
            loss, parts = self._task.step(batch, self._inputs)
            gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            return loss.detach(), parts, gradients

        # Recording and checking draw random numbers that no step sees.
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            try:
                replay, outcome = self._record(run)
                for name, tensor in tensors.items():
                    self._inputs[name].copy_(tensor)
                torch.manual_seed(0)
                replay()
                torch.manual_seed(0)
                reason = None if _agree(outcome, run()) else "its replay differs from the step"
            except RuntimeError as error:
                reason = (str(error).splitlines() or ["unknown"])[0]
        if reason:
            self.refusal = reason
            log.info(f"the step cannot be recorded as a CUDA graph, training goes on without: {reason}")
            return False
        self._replay, self._outcome = replay, outcome
        return True


def _agree(one: Outcome, other: Outcome) -> bool:
    """True if outcomes are equal to a rounding of bfloat16, 0.5 % of the loss and of the norm of all gradients."""
    if [part is None for part in one[2]] != [part is None for part in other[2]]:
        return False
    pairs = [(a.double(), b.double()) for a, b in zip(one[2], other[2], strict=True) if a is not None and b is not None]
    apart = sum((a - b).square().sum() for a, b in pairs)
    size = sum(b.square().sum() for _, b in pairs)
    close = (one[0] - other[0]).abs() <= 0.005 * other[0].abs() and apart <= 0.005**2 * size
    return bool(close)


class _Replayed(torch.autograd.Function):
    """The loss of a replay, with the gradients that came with it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = iter(torch._foreach_mul([part for part in ctx.gradients if part is not None], gradient))
        return None, None, *(None if part is None else next(scaled) for part in ctx.gradients)


def _record_on_gpu(function: Callable[[], Outcome]) -> tuple[Callable[[], None], Outcome]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Threads that load the next batches may use the GPU meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outcome = function()
    return graph.replay, outcome


def _shape(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype

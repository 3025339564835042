"""A training step, forward and backward, as one CUDA graph: nothing of Python between its kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..distributed.collectives import first_refusal, is_main
from ..utils.device import give_back
from ..utils.errors import first_line

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
        """All that a step reads of a batch, by name, drawn samples included; None: this one cannot be recorded.

        Where ranks share a batch, all of them return None for the same ones, and the same shapes are new on all.
        """

    def outcome(self, batch: Any, tensors: dict[str, Tensor], *, reduce: bool) -> Outcome:
        """Step, forward and backward, of a batch whose tensors are replaced by others, on the device.

        Args:
            reduce: gradients are the mean over the ranks.
        """


def outcome_of(loss: Tensor, parts: dict[str, Tensor], module: nn.Module) -> Outcome:
    """Backward of a loss."""
    return loss.detach(), parts, torch.autograd.grad(loss, trained(module), allow_unused=True)


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that train, in the order of gradients."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class StepGraph:
    """Records the step of a task once and replays it for every batch of the same shapes.

    A recording is used only if its first replay gives the loss and gradients of the ordinary step, to the rounding of
    half precision: what a recording gets wrong (an input that is not copied, a value read on the host) is no rounding.
    A batch that is larger than the recorded one is recorded in its place; smaller ones take the ordinary step.

    Ranks that share a batch record and replay together: a replay runs the collectives of all of them. If one rank
    cannot, none does.

    A recording holds the memory of a whole step for itself, in a pool of its own that nothing else takes memory from.
    There is one recording at a time, so one such pool; whatever else was reserved is given back before it is made, and
    what ordinary steps and validation reserve beside it before the next replay.

    Args:
        task: the objective; its parameters must stay where they are.
        device: a GPU.
        record: for tests, another way to record.
        together: the ranks share a batch.
        reduce: the recording also averages gradients over the ranks.

    Attributes:
        refusal: why there is no recording; None: there is one, or none was tried yet.
        reduce: as the argument.
    """

    def __init__(
        self,
        task: Recordable,
        device: torch.device,
        record: Recorder | None = None,
        *,
        together: bool = False,
        reduce: bool = False,
    ) -> None:
        self._task, self._device = task, device
        self._record: Recorder = record or _record_on_gpu
        self._together, self.reduce = together, reduce
        self._inputs: dict[str, Tensor] = {}
        self._replay: Callable[[], None] | None = None
        self._outcome: Outcome | None = None
        self._ordinary_steps = 0
        self._beside = False
        self.refusal: str | None = None

    def __call__(self, batch: Any) -> Outcome | None:
        """Loss, detached scalars and gradients of a batch; None: take the ordinary step.

        The gradients are the recording's own tensors: the next call writes others into them.
        """
        found = self._replayed(batch)
        if found is None:
            self.runs_beside()
        return found

    def _replayed(self, batch: Any) -> Outcome | None:
        tensors = None if self.refusal else self._task.tensors(batch)
        if tensors is None:
            return None
        if self._replay is None:
            self._ordinary_steps += 1
            if self._ordinary_steps <= WARM_UP:
                return None
        if not self._fits(tensors) and not (self._larger(tensors) and self._try(batch, tensors)):
            return None
        assert self._replay is not None
        assert self._outcome is not None
        if self._beside:
            self._release()
        for name, tensor in tensors.items():
            self._inputs[name].copy_(tensor, non_blocking=True)
        self._replay()
        loss, parts, gradients = self._outcome
        return loss.clone(), {name: part.clone() for name, part in parts.items()}, gradients

    def runs_beside(self) -> None:
        """Something else runs on the device now, whose memory is to be given back before the next replay."""
        self._beside = True

    def close(self) -> None:
        """Drop the recording: NCCL lets no group of ranks end while a graph holds its collectives."""
        self._replay = self._outcome = None
        self._inputs = {}

    def _fits(self, tensors: dict[str, Tensor]) -> bool:
        recorded = {name: (tensor.shape, tensor.dtype) for name, tensor in self._inputs.items()}
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == recorded

    def _larger(self, tensors: dict[str, Tensor]) -> bool:
        """True if some input is larger than the recorded one and none is smaller."""
        known = self._inputs or tensors
        return all(tensor.numel() >= known[name].numel() for name, tensor in tensors.items())

    def _release(self) -> None:
        give_back(self._device)
        self._beside = False

    def _try(self, batch: Any, tensors: dict[str, Tensor]) -> bool:
        """Record the step; where that fails, say so once and never try again."""
        self.close()
        self._release()  # the memory of the one before, and of ordinary steps, is free for what follows
        self._inputs = {name: tensor.to(self._device, copy=True) for name, tensor in tensors.items()}
        # Recording and checking draw random numbers that no step sees, and update statistics that count no batch.
        devices = [self._device] if self._device.type == "cuda" else []
        buffers = [(buffer, buffer.clone()) for buffer in self._task.module.buffers()]
        with torch.random.fork_rng(devices):
            reason = self._record_and_check(batch, tensors)
            for buffer, before in buffers:
                buffer.copy_(before)
        self._release()  # what the check took
        if reason:
            self.close()
            self.refusal = reason
            if is_main() or not self._together:
                log.info(f"the step cannot be recorded as a CUDA graph, training goes on without: {reason}")
        return reason is None

    def _record_and_check(self, batch: Any, tensors: dict[str, Tensor]) -> str | None:
        """Why there is no recording; None: there is one, on all ranks."""

        def run() -> Outcome:
            loss, parts, gradients = self._task.outcome(batch, self._inputs, reduce=self.reduce)
            return loss, parts, _owned(gradients)

        # The ordinary step first: its memory is free again when the recording reserves its own.
        torch.manual_seed(0)
        try:
            expected = run()
        except RuntimeError as error:
            if self._together:
                raise  # the others wait in a collective of this step
            return first_line(error)
        # Recorded on mirrored inputs, checked on the true ones: what it kept of its own inputs shows.
        for name, tensor in tensors.items():
            self._inputs[name].copy_(tensor.flip(-1))
        reason = None
        try:
            self._replay, self._outcome = self._record(run)
        except RuntimeError as error:
            reason = first_line(error)
        if reason := self._agreed(reason):
            return reason
        assert self._replay is not None
        assert self._outcome is not None
        # Mirrored labels may cost nearly the same: what no replay writes shows as NaN.
        for tensor in (self._outcome[0], *filter(torch.is_tensor, self._outcome[2])):
            tensor.fill_(torch.nan)
        for name, tensor in tensors.items():
            self._inputs[name].copy_(tensor)
        torch.manual_seed(0)
        try:
            self._replay()
            reason = None if _agree(self._outcome, expected) else "its replay differs from the step"
        except RuntimeError as error:
            reason = first_line(error)
        return self._agreed(reason)

    def _agreed(self, reason: str | None) -> str | None:
        """The same verdict on all ranks that share a batch."""
        return first_refusal(reason) if self._together else reason


def _owned(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients in memory of their own, contiguous: an optimizer or a clipping writes to each as if it were alone."""
    seen: set[int] = set()
    found: list[Tensor | None] = []
    for gradient in gradients:
        if gradient is not None:
            shared = gradient.data_ptr() in seen
            gradient = gradient.clone() if shared else gradient.contiguous()
            seen.add(gradient.data_ptr())
        found.append(gradient)
    return found


def _agree(one: Outcome, other: Outcome) -> bool:
    """True if outcomes are equal to a rounding of bfloat16, 0.5 % of the loss and of norms (gradients; each part)."""
    if [part is None for part in one[2]] != [part is None for part in other[2]]:
        return False
    apart = size = torch.zeros((), dtype=torch.float64, device=one[0].device)
    for a, b in zip(one[2], other[2], strict=True):
        if a is not None and b is not None:  # one gradient in float64 at a time: all of them are twice the weights
            apart, size = apart + (a.double() - b).square().sum(), size + b.double().square().sum()
    close = (one[0] - other[0]).abs() <= 0.005 * other[0].abs() and apart <= 0.005**2 * size
    return bool(close) and all(
        bool((part - other[1][name]).double().norm() <= 0.005 * other[1][name].double().norm())
        for name, part in one[1].items()
    )


def _record_on_gpu(function: Callable[[], Outcome]) -> tuple[Callable[[], None], Outcome]:
    graph = torch.cuda.CUDAGraph()
    # It gives the memory of ordinary steps back first. Threads that load the next batches may use the GPU meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outcome = function()
    return graph.replay, outcome

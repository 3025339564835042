"""An operator at one shape: each implementation forward and backward, behind the gate."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from pspg.engine.utils.errors import first_line

from .gate import poisoned, ratios
from .harness import MOST, Counts, Sizes, Unavailable, Verdict, check_kernels, flop_counter, seconds_of
from .machine import cache_bytes
from .problem import Operator, Problem, as_tuple, cotangents, gradients

ORACLE_FLOPS = {"cpu": 6 * 10**11, "cuda": 15 * 10**13}
"""what the literal equations in float64 may cost; above it a seeded sample of classes or pairs is checked"""


class OperatorCase:
    """See `harness.Case`. The inputs are the same every time."""

    def __init__(self, operator: Operator, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
        self.operator, self.sizes, self.dtype, self.device = operator, sizes, dtype, device
        torch.manual_seed(0)
        self.problem = operator.make(sizes, device, dtype)
        exact = self.problem.to(torch.float64)
        self.parts = operator.parts(operator.impls["reference"], self.problem, exact, ORACLE_FLOPS[device.type])
        self.problems = _copies(self.problem, device)
        self.runs: dict[str, Run] = {}

    def prepare(self, impl: str) -> Callable[[int], dict[str, float]]:
        check_kernels(impl, self.device)
        return self.start(impl)

    def start(self, impl: str) -> Callable[[int], dict[str, float]]:
        """`prepare`, of kernels in Triton's interpreter too, whose times mean nothing."""
        self.runs[impl] = Run(self, impl)
        return self.runs[impl].prepare()

    def verdicts(self, ran: Sequence[str]) -> dict[str, Verdict]:
        """Compare with the oracle; the baseline of the errors is the literal equations, or else eager.

        Where neither was asked for, it runs once, untimed: the literal equations if they are cheap.
        """
        found = {name: self.runs[name].found for name in ran}
        baseline = next((name for name in ("reference", "repaired", "eager") if name in ran), None)
        if baseline in (None, "eager"):
            literal = Run(self, "reference" if len(self.parts) == 1 and "reference" not in self.runs else "eager")
            literal.check()
            found = {"": literal.found, **found}
        else:
            found = {baseline: found[baseline], **found}
        worst = dict.fromkeys(found, 0.0)
        for number, part in enumerate(self.parts):
            outcomes = {name: tensors[number] for name, tensors in found.items()}
            for name, ratio in ratios(outcomes, part.expected, self.dtype).items():
                worst[name] = max(worst[name], ratio)
        if not worst[next(iter(found))] <= 1:  # a wrong baseline proves nothing
            return {name: Verdict(max(worst[name], worst[next(iter(found))])) for name in ran}
        return {name: Verdict(worst[name], self.runs[name].detail) for name in ran}

    def counts(self) -> Counts:
        """FLOPs and bytes from tensors without storage."""
        problem = self.operator.make(self.sizes, torch.device("meta"), self.dtype)
        leaves = tuple(leaf.requires_grad_() for leaf in problem.leaves)
        with flop_counter() as forward:
            outputs = as_tuple(self.operator.impls["eager"](replace(problem, leaves=leaves)))
        with flop_counter() as backward:
            gradients(outputs, leaves)
        read, written = (sum(t.nbytes for t in part) for part in (list(problem.tensors()), outputs))
        moved = read + written + sum(leaf.nbytes for leaf in leaves)
        there, back = forward.get_total_flops(), backward.get_total_flops()
        return {"forward": (there, read + written), "backward": (back, moved), "both": (there + back, moved)}


class Run:
    """One implementation: a call repeats it, and the first repetition is kept for the gate."""

    def __init__(self, case: OperatorCase, name: str) -> None:
        self.case, self.name, self.device = case, name, case.device
        self.function = case.operator.impls["eager" if name == "compiled" else name]
        self.found: list[list[Tensor]] = []
        self.detail = ""

    def prepare(self) -> Callable[[int], dict[str, float]]:
        """Compile or record what has to be.

        Raises:
            Unavailable: it cannot run here.
        """
        if self.name == "compiled":
            self._compile()
        elif self.device.type == "cuda":
            return self._recorded()
        return self._direct

    def check(self) -> dict[str, float]:
        """The first repetition, on what the gate knows the outcome of; times of the whole problem only."""
        times: dict[str, float] = {}
        self.found = []
        # What is compiled allocates for itself, and would be compiled anew for another mode of torch.
        with nullcontext() if self.name == "compiled" else poisoned():
            for number, part in enumerate(self.case.parts):
                found, tensors = self._timed(part.problem)
                times = times if number else found
                self.found.append([tensor.clone() for tensor in part.view(tensors)])
        return times

    def _forward(self, problem: Problem) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        leaves = tuple(leaf.detach().requires_grad_() for leaf in problem.leaves)
        with torch.autocast(self.device.type, self.case.dtype, enabled=self.case.dtype != torch.float32):
            return as_tuple(self.function(replace(problem, leaves=leaves))), leaves

    def _both(self, problem: Problem) -> list[Tensor]:
        outputs, leaves = self._forward(problem)
        return [*(output.detach() for output in outputs), *gradients(outputs, leaves)]

    def _direct(self, turn: int) -> dict[str, float]:
        return self._timed(self.case.problems[turn % len(self.case.problems)])[0] if turn else self.check()

    def _timed(self, problem: Problem) -> tuple[dict[str, float], list[Tensor]]:
        kept: dict[str, tuple[Tensor, ...]] = {}

        def forward() -> None:
            kept["outputs"], kept["leaves"] = self._forward(problem)

        def backward() -> None:
            kept["gradients"] = torch.autograd.grad(
                kept["outputs"], kept["leaves"], grad_outputs, materialize_grads=True
            )

        there = seconds_of(forward, self.device)
        grad_outputs = cotangents(kept["outputs"])
        back = seconds_of(backward, self.device)
        outputs = [output.detach() for output in kept["outputs"]]
        return {"forward": there, "backward": back, "both": there + back}, [*outputs, *kept["gradients"]]

    def _compile(self) -> None:
        compiler = os.environ.get("CXX", "g++")
        if self.device.type == "cpu" and shutil.which(compiler) is None:
            raise Unavailable(f"torch.compile needs a C++ compiler, {compiler} is not there")
        torch._dynamo.reset()
        self.function = torch.compile(self.function, mode="reduce-overhead" if self.device.type == "cuda" else None)
        try:
            seconds = seconds_of(lambda: self._both(self.case.problem), self.device)
        except Exception as error:  # whatever the compiler raises, it cannot compile this
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise Unavailable(f"torch.compile: {reason}"[:200]) from None
        self.detail = f"compiled in {seconds:.0f} s"

    def _recorded(self) -> Callable[[int], dict[str, float]]:
        """Forward, and forward with backward, as CUDA graphs: how the engine runs them; backward is the difference.

        Before each replay the cache is swept and the outcome poisoned.
        """
        problem = self.case.problem
        try:
            forward, _ = _graph(lambda: list(self._forward(problem)[0]))
            both, tensors = _graph(lambda: self._both(problem))
        except RuntimeError as error:
            if "memory" in str(error):
                raise
            self.detail = f"no CUDA graph: {first_line(error)}"[:200]
            return self._direct
        sweep = torch.empty(2 * cache_bytes(self.device), dtype=torch.int8, device=self.device)

        def call(turn: int) -> dict[str, float]:
            if turn == 0:
                for tensor in tensors:
                    tensor.fill_(torch.nan)
                both()
                self.found = [[tensor.clone() for tensor in self.case.parts[0].view(tensors)]]
                self.found += [part.view(self._both(part.problem)) for part in self.case.parts[1:]]
            times = []
            for replay in (forward, both):
                sweep.zero_()
                times.append(seconds_of(replay, self.device))
            return {"forward": times[0], "backward": max(times[1] - times[0], 0.0), "both": times[1]}

        return call


def _copies(problem: Problem, device: torch.device) -> list[Problem]:
    """Sets of inputs that together are twice the cache, so that no repetition finds its own there."""
    if device.type == "cuda":  # graphs read one set; the cache is swept instead
        return [problem]
    size = sum(leaf.nbytes for leaf in problem.leaves)
    count = min(max(2 * cache_bytes(device) // max(size, 1), 1), MOST)
    return [problem, *(replace(problem, leaves=tuple(t.clone() for t in problem.leaves)) for _ in range(count))]


def _graph(function: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tensors = function()
    return graph.replay, tensors

"""The operators of the registry as jobs: each form forward and backward, behind the gate."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .counting import flop_counter
from .gate import poisoned, ratios
from .harness import MOST, Measured, Unavailable, seconds_of, take_turns
from .machine import cache_bytes
from .registry import OPERATORS, Form, Part, Problem, Shape, as_tuple, cotangents, gradients
from .rows import FAILED, NOT_RUN, OK, TOO_LARGE, Row, without_numbers

DIRECTIONS = ("forward", "backward", "both")
PROVIDERS = ("reference", "repaired", "eager", "compiled", "triton")
SLOW_TO_COMPILE = ("spcl", "text_tower")
"""on a CPU, where others are compiled for the smallest shape only"""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ORACLE_FLOPS = {"cpu": 6 * 10**11, "cuda": 15 * 10**13}
"""what the literal equations in float64 may cost; above it a seeded sample of classes or pairs is checked"""


@dataclass(frozen=True)
class OperatorJob:
    """All providers of an operator at a shape."""

    operator: str
    shape: Shape
    dtype: str
    rank: int = 0

    @property
    def key(self) -> str:
        c, b, n = self.shape
        batch = f"-B{b}" if OPERATORS[self.operator].by_batch else ""
        return f"operators/{self.operator}/C{c}{batch}-n{n}-{self.dtype}"

    def parts(self, device: torch.device) -> tuple[Problem, list[Part]]:
        """The inputs, the same every time, and what is known of the outcome."""
        operator = OPERATORS[self.operator]
        torch.manual_seed(0)
        problem = operator.make(self.shape, device, DTYPES[self.dtype])
        exact = problem.to(torch.float64)
        return problem, operator.parts(operator.forms["reference"], problem, exact, ORACLE_FLOPS[device.type])

    def run(self, device: torch.device, without: Mapping[str, str], started: Callable[[str], None]) -> list[Row]:
        """See `suite.Job`."""
        problem, parts = self.parts(device)
        problems = _copies(problem, device)
        runs = {name: Run(self, name, problems, parts, device) for name in PROVIDERS if name not in without}
        measured = take_turns({name: run.prepare for name, run in runs.items()}, device, started)
        measured |= {name: Measured(status=TOO_LARGE, detail=why) for name, why in without.items()}
        errors = worst_ratios({name: run for name, run in runs.items() if measured[name].status is None}, parts)
        rows = []
        row, counts = self._row(device), self._counts()
        for name in PROVIDERS:
            for one in measured[name].rows(replace(row, provider=name), DIRECTIONS):
                flops, size = counts[one.direction]
                detail = one.detail or (runs[name].detail if name in runs else "")
                rows.append(gated(replace(one, flops=flops, bytes=size, detail=detail), errors.get(name)))
        return rows

    def _row(self, device: torch.device) -> Row:
        c, b, n = self.shape
        return Row(
            job=self.key,
            suite="operators",
            operator=self.operator,
            provider="",
            C=c,
            B=b if OPERATORS[self.operator].by_batch else None,
            n=n,
            device=device.type,
            dtype=self.dtype,
        )

    def _counts(self) -> dict[str, tuple[int | None, int | None]]:
        """Direction → FLOPs of the exact algebra, and bytes that must be moved, from tensors without storage."""
        operator = OPERATORS[self.operator]
        problem = operator.make(self.shape, torch.device("meta"), DTYPES[self.dtype])
        leaves = tuple(leaf.requires_grad_() for leaf in problem.leaves)
        with flop_counter() as forward:
            outputs = as_tuple(operator.forms["eager"](replace(problem, leaves=leaves)))
        with flop_counter() as backward:
            gradients(outputs, leaves)
        read, written = (sum(t.nbytes for t in part) for part in (list(problem.tensors()), outputs))
        by_leaves = sum(leaf.nbytes for leaf in leaves)
        there, back = forward.get_total_flops(), backward.get_total_flops()
        if there and not back:  # its gradients come with its forward: other forms share the work otherwise
            return {"forward": (None, None), "backward": (None, None), "both": (there, read + written + by_leaves)}
        return {
            "forward": (there, read + written),
            "backward": (back, read + written + by_leaves),
            "both": (there + back, read + written + by_leaves),
        }


class Run:
    """One form on one device: a call repeats it, and the first repetition is kept for the gate."""

    def __init__(
        self, job: OperatorJob, name: str, problems: list[Problem], parts: list[Part], device: torch.device
    ) -> None:
        self.job, self.name, self.problems, self.parts, self.device = job, name, problems, parts, device
        self.form: Form = OPERATORS[job.operator].forms["eager" if name == "compiled" else name]
        self.dtype = DTYPES[job.dtype]
        self.found: list[list[Tensor]] = []
        self.detail = ""

    def prepare(self) -> Callable[[int], dict[str, float]]:
        """Compile what has to be compiled.

        Raises:
            Unavailable: the form cannot run here.
        """
        if self.name == "triton" and self.device.type != "cuda":
            raise Unavailable("kernels need a GPU of compute capability 8.0 or newer")
        if self.name == "compiled":
            self._compile()
        elif self.device.type == "cuda":
            return self._recorded()
        return self._direct

    def _forward(self, problem: Problem) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        leaves = tuple(leaf.detach().requires_grad_() for leaf in problem.leaves)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return as_tuple(self.form(replace(problem, leaves=leaves))), leaves

    def _both(self, problem: Problem) -> list[Tensor]:
        outputs, leaves = self._forward(problem)
        return [*(output.detach() for output in outputs), *gradients(outputs, leaves)]

    def _direct(self, turn: int) -> dict[str, float]:
        if turn == 0:
            # What is compiled allocates for itself, and would be compiled anew for another mode of torch.
            with nullcontext() if self.name == "compiled" else poisoned():
                return self._check()
        return self._timed(self.problems[turn % len(self.problems)])[0]

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

    def _check(self) -> dict[str, float]:
        """The first repetition, on what the gate knows the outcome of; times of the whole problem only."""
        times: dict[str, float] = {}
        self.found = []
        for number, part in enumerate(self.parts):
            found, tensors = self._timed(part.problem)
            times = times if number else found
            self.found.append([tensor.clone() for tensor in part.view(tensors)])
        return times

    def _compile(self) -> None:
        compiler = os.environ.get("CXX", "g++")
        if self.device.type == "cpu":
            if shutil.which(compiler) is None:
                raise Unavailable(f"torch.compile needs a C++ compiler, {compiler} is not there")
            if self.job.rank or self.job.operator in SLOW_TO_COMPILE:
                raise Unavailable("left out on a CPU: compiling takes longer than the rest of the job", NOT_RUN)
        torch._dynamo.reset()
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        self.form = torch.compile(self.form, mode=mode)
        try:
            seconds = seconds_of(lambda: self._both(self.problems[0]), self.device)
        except Exception as error:  # whatever the compiler raises, it cannot compile this
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise Unavailable(f"torch.compile: {reason}"[:200]) from None
        self.detail = f"compiled in {seconds:.0f} s"

    def _recorded(self) -> Callable[[int], dict[str, float]]:
        """Forward, and forward with backward, as CUDA graphs: how the engine runs them; backward is the difference.

        Before each replay the cache is swept and the outcome poisoned.
        """
        problem = self.problems[0]
        try:
            forward, _ = _graph(lambda: list(self._forward(problem)[0]))
            both, tensors = _graph(lambda: self._both(problem))
        except RuntimeError as error:
            if "memory" in str(error):
                raise
            self.detail = f"no CUDA graph: {(str(error).splitlines() or [''])[0]}"[:200]
            return self._direct
        sweep = torch.empty(2 * cache_bytes(self.device), dtype=torch.int8, device=self.device)

        def call(turn: int) -> dict[str, float]:
            if turn == 0:
                for tensor in tensors:
                    tensor.fill_(torch.nan)
                both()
                self.found = [[tensor.clone() for tensor in self.parts[0].view(tensors)]]
                self.found += [part.view(self._both(part.problem)) for part in self.parts[1:]]
            sweep.zero_()
            there = seconds_of(forward, self.device)
            sweep.zero_()
            whole = seconds_of(both, self.device)
            return {"forward": there, "backward": max(whole - there, 0.0), "both": whole}

        return call


def gated(row: Row, error: float | None) -> Row:
    """The row with its error; without numbers if it is wrong."""
    if row.status != OK or error is None:
        return row
    if error <= 1:
        return replace(row, error=error)
    return replace(without_numbers(row, FAILED, f"error is {error:.3g} times what is allowed"), error=error)


def jobs(device: str) -> list[OperatorJob]:
    """Operators at the shapes of a device, the largest vocabulary that people train first."""
    if device == "cpu":
        shapes = [Shape(14, 16), Shape(28, 8)]
        return [OperatorJob(name, shape, "fp32", rank) for rank, shape in enumerate(shapes) for name in OPERATORS]
    found = [OperatorJob(name, Shape(108, 64), "bf16", 0) for name in OPERATORS]
    for classes in (28, 14, 193):
        found += [OperatorJob(name, Shape(classes, 64), "bf16", 20) for name in OPERATORS]
    for batch in (16, 256):
        for classes in (108, 28, 14, 193):
            found += [
                OperatorJob(name, Shape(classes, batch), "bf16", 40)
                for name, operator in OPERATORS.items()
                if operator.by_batch
            ]
    return found + [OperatorJob(name, Shape(108, 64), "fp32", 60) for name in OPERATORS]


def worst_ratios(runs: Mapping[str, Run], parts: list[Part]) -> dict[str, float]:
    """Form → its worst ratio of the gate over the parts; the first form is the baseline."""
    worst = dict.fromkeys(runs, 0.0)
    for number, part in enumerate(parts):
        found = {name: run.found[number] for name, run in runs.items()}
        dtype = next(iter(runs.values())).dtype if runs else torch.float32
        for name, ratio in ratios(found, part.expected, dtype).items():
            worst[name] = max(worst[name], ratio)
    return worst


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

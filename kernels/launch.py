"""Start kernels: pinned configurations by architecture, one strides convention, a record of launches without a GPU.

Every tensor argument of every kernel is contiguous, so that a kernel derives all its strides from sizes. The exception
is a stack of contiguous matrices with gaps between them, such as the slice [:, i] of (G,n,C,H): it is passed as
`Batched(tensor)` and reaches the kernel as two parameters, the pointer `x` and the distance of matrices `x_batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CONFIGS: dict[str, dict[int, dict[str, int]]] = {}
"""kernel → smallest architecture (80, 86, 90, 100) a configuration is for → num_warps, num_stages and block sizes.

Modules of kernels add theirs with `pin`. An architecture takes the entry with the largest number not above its own.
"""


@dataclass(frozen=True)
class Batched:
    """A kernel argument (A,R,K): A contiguous matrices at any distance from one another. None is an absent argument."""

    tensor: Tensor | None

    @property
    def parameters(self) -> tuple[Tensor | None, int]:
        """Pointer and batch stride, in elements.

        Raises:
            ValueError: the tensor has another number of dimensions, or a matrix has gaps.
        """
        if self.tensor is None:
            return None, 0
        if self.tensor.dim() != 3 or (len(self.tensor) and not self.tensor[0].is_contiguous()):
            raise ValueError(f"needs (A,R,K) with contiguous matrices, got {_layout(self.tensor)}")
        return self.tensor, self.tensor.stride(0)


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded and not made."""

    kernel: Any
    """triton.JITFunction"""
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    """by parameter name: tensors (of any device, meta included), numbers, constants"""
    options: Mapping[str, int]
    """num_warps, num_stages, launch_pdl, launch_cooperative_grid"""


_OPTIONS = ("num_warps", "num_stages", "launch_pdl", "launch_cooperative_grid")
_recorder: tuple[int, Callable[[Launch], None]] | None = None
_overlapped = False


@contextmanager
def record(architecture: int, notice: Callable[[Launch], None] | None = None) -> Iterator[list[Launch]]:
    """Within this context launches are listed instead of made, with the configurations of `architecture` (90: sm_90).

    Host code then runs on tensors of the meta device, at any shape, without a GPU or a driver.

    Args:
        architecture: whose configurations are taken.
        notice: called with each launch when it would be made; None: the list that the context gives collects them.
    """
    global _recorder
    before, launches = _recorder, list[Launch]()
    _recorder = (architecture, notice or launches.append)
    try:
        yield launches
    finally:
        _recorder = before


def recording() -> bool:
    """Tell if launches are listed instead of made; kernels then take tensors of any device."""
    return _recorder is not None


def pin(kernel: str, **configurations: Mapping[str, int]) -> None:
    """Set the configurations of a kernel: `sm_80={"num_warps": 4, "num_stages": 2, "BLOCK": 64}`, `sm_90=…`."""
    CONFIGS[kernel] = {int(name.removeprefix("sm_")): dict(values) for name, values in configurations.items()}


def configuration(kernel: str, device: torch.device) -> dict[str, int]:
    """Configuration of a kernel on a device; the interpreter takes the oldest architecture's.

    Raises:
        ValueError: `replaced` names a value that the kernel does not have.
    """
    known, here = CONFIGS[kernel], architecture(device)
    pinned = known[max((number for number in known if number <= here), default=min(known))]
    if _replaced is None:
        return dict(pinned)
    configurations, asked = _replaced
    asked.add(kernel)
    values = configurations.get(kernel, {})
    if unknown := values.keys() - pinned.keys():
        raise ValueError(f"{kernel} has no {', '.join(sorted(unknown))}; it has {', '.join(pinned)}")
    return {**pinned, **values}


_replaced: tuple[Mapping[str, Mapping[str, int]], set[str]] | None = None


@contextmanager
def replaced(**configurations: Mapping[str, int]) -> Iterator[set[str]]:
    """Within this context kernels have these values in place of pinned ones, on any architecture.

    Backward of what ran in it must run in it, too.

    Args:
        configurations: kernel → values by name; the others stay.

    Returns:
        Kernels whose configurations were read within the context so far.
    """
    global _replaced
    before, asked = _replaced, set[str]()
    _replaced = configurations, asked
    try:
        yield asked
    finally:
        _replaced = before


def interpreted(device: torch.device) -> bool:
    """True where Triton's interpreter runs a kernel's programs, one after the other."""
    return device.type != "cuda" and not recording()


def can_overlap(device: torch.device) -> bool:
    """True where a kernel can start while the one before ends (`launch_pdl`, programmatic dependent launch)."""
    return architecture(device) >= 90


@contextmanager
def overlapped() -> Iterator[None]:
    """Within this context kernels with a parameter OVERLAP are set up while the one before ends, where a GPU can do it.

    Their first instruction waits until it has ended (`primitives.follow`), so that results stay the same. Not the
    default before a GPU has run it.
    """
    global _overlapped
    before, _overlapped = _overlapped, True
    try:
        yield
    finally:
        _overlapped = before


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **keywords: Any) -> None:
    """Start a @triton.jit function on the device of its first tensor, or record that it would be.

    Args:
        grid: programs in up to three dimensions. None of them: nothing happens.
        arguments: the kernel's first parameters, in order: contiguous tensors, tensor descriptors of such, `Batched`,
            numbers, None, named tuples of these without `Batched`.
        keywords: the others by name; num_warps, num_stages, launch_pdl and launch_cooperative_grid. OVERLAP, where it
            is not among them, is what `overlapped` says.

    Raises:
        ValueError: a tensor that is not laid out as it has to be.
    """
    if 0 in grid:
        return
    arguments = _laid_out(kernel, arguments)
    device = next(tensor.device for argument in arguments for tensor in tensors_of("", argument).values())
    if "OVERLAP" in kernel.arg_names and "OVERLAP" not in keywords:
        keywords["OVERLAP"] = _overlapped and can_overlap(device)
        keywords |= {"launch_pdl": True} if keywords["OVERLAP"] else {}
    if _recorder is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        options = {name: keywords[name] for name in _OPTIONS if name in keywords}
        named.update((name, value) for name, value in keywords.items() if name not in options)
        _recorder[1](Launch(kernel, grid, named, options))
        return
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **keywords)


def tensor_of(argument: Any) -> Tensor | None:
    """The tensor that an argument is or, a tensor descriptor, describes; None for others."""
    tensor = argument if isinstance(argument, Tensor) else getattr(argument, "base", None)
    return tensor if isinstance(tensor, Tensor) else None


def tensors_of(name: str, argument: Any) -> dict[str, Tensor]:
    """The tensors of an argument by name; those of a named tuple are `name.field`."""
    if isinstance(argument, tuple):
        named: Any = argument
        fields = zip(named._fields, argument, strict=True)
        return {key: found for field, part in fields for key, found in tensors_of(f"{name}.{field}", part).items()}
    tensor = tensor_of(argument)
    return {} if tensor is None else {name: tensor}


def _laid_out(kernel: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The parameters that the arguments make, each tensor checked."""
    parameters: list[Any] = []
    for argument in arguments:
        name = kernel.arg_names[len(parameters)]
        if isinstance(argument, Batched):
            try:
                parameters += argument.parameters
            except ValueError as error:
                raise ValueError(f"{kernel.__name__}: {name} {error}") from None
            continue
        for field, tensor in tensors_of(name, argument).items():
            if not tensor.is_contiguous():
                raise ValueError(f"{kernel.__name__}: {field} must be contiguous, got {_layout(tensor)}")
        parameters.append(argument)
    return tuple(parameters)


def _layout(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)} with strides {tensor.stride()}"


def architecture(device: torch.device) -> int:
    """90 for sm_90; the recorded one within `record`, and 80 in the interpreter."""
    if _recorder is not None:
        return _recorder[0]
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device: 1 in the interpreter, those of the largest model of its kind within `record`."""
    if _recorder is not None:
        return {80: 108, 86: 84, 90: 132, 100: 148}.get(_recorder[0], 108)
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def processors(device: torch.device) -> int | None:
    """`multiprocessors` of a GPU, also a recorded one; None: a CPU, whose work does not come in waves."""
    return None if interpreted(device) else multiprocessors(device)

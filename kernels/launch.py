"""How kernels are started: pinned configurations by architecture, and a record of launches where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CONFIGS: dict[str, dict[int, dict[str, int]]] = {}
"""kernel → smallest architecture (80, 86, 90, 100) a configuration is for → num_warps, num_stages and block sizes.

`fused.py` files add theirs with `pin`. An architecture takes the entry with the largest number not above its own.
"""


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded and not made."""

    kernel: Any
    """triton.JITFunction"""
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    """by parameter name: tensors (of any device, meta included), numbers, constants"""
    options: Mapping[str, int]
    """num_warps, num_stages"""


_OPTIONS = ("num_warps", "num_stages")
_recorder: tuple[int, list[Launch]] | None = None


@contextmanager
def record(architecture: int) -> Iterator[list[Launch]]:
    """Within this context launches are listed instead of made, with the configurations of `architecture` (90: sm_90).

    Host code then runs on tensors of the meta device, at any shape, without a GPU or a driver.
    """
    global _recorder
    before, launches = _recorder, list[Launch]()
    _recorder = (architecture, launches)
    try:
        yield launches
    finally:
        _recorder = before


def pin(kernel: str, **configurations: Mapping[str, int]) -> None:
    """Set the configurations of a kernel: `sm_80={"num_warps": 4, "num_stages": 2, "BLOCK": 64}`, `sm_90=…`."""
    CONFIGS[kernel] = {int(name.removeprefix("sm_")): dict(values) for name, values in configurations.items()}


def configuration(kernel: str, device: torch.device) -> dict[str, int]:
    """Configuration of a kernel on a device; the interpreter takes the oldest architecture's."""
    known = CONFIGS[kernel]
    architecture = _architecture(device)
    return known[max((number for number in known if number <= architecture), default=min(known))]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **keywords: Any) -> None:
    """Start a @triton.jit function on the device of its first tensor, or record that it would be.

    Args:
        grid: programs in up to three dimensions. None of them: nothing happens.
        arguments: the kernel's first parameters, in order.
        keywords: the others by name; num_warps and num_stages.
    """
    if 0 in grid:
        return
    if _recorder is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        options = {name: keywords[name] for name in _OPTIONS if name in keywords}
        named.update((name, value) for name, value in keywords.items() if name not in options)
        _recorder[1].append(Launch(kernel, grid, named, options))
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **keywords)


def _architecture(device: torch.device) -> int:
    if _recorder is not None:
        return _recorder[0]
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor

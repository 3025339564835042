"""One place where an operator picks its implementation and checks its inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

from .launch import recording

Function = TypeVar("Function", bound=Callable[..., object])


def resolve(impl: str, available: Mapping[str, Function]) -> Function:
    """Implementation to run.

    Args:
        impl: name of an implementation, or "auto" for the first of `available`.
        available: implementations that can run here, best first.

    Raises:
        ValueError: an explicit choice that cannot run; it is never replaced by another one.
    """
    if impl == "auto":
        return next(iter(available.values()))
    if impl not in available:
        why = "; triton " + _NEEDS if impl == "triton" else ""
        raise ValueError(f"impl={impl!r} is not available, choose from auto, {', '.join(available)}{why}")
    return available[impl]


_NEEDS = (
    "needs Linux, a CUDA device of compute capability 8.0 or newer, float32, bfloat16 or float16, and an operator and "
    "shape that have kernels"
)


def with_triton(
    available: Mapping[str, Function], kernels: Function, tensor: Tensor, dtype: torch.dtype | None = None
) -> dict[str, Function]:
    """Implementations of an operator, its Triton kernels among them as "triton" where they can run.

    They come first on a GPU, and where launches are recorded instead of made. In Triton's interpreter
    (TRITON_INTERPRET=1, for tests) they come last, so that `auto` never picks them there.

    Args:
        available: the other implementations, best first.
        kernels: the one made of kernels. It imports triton when it is called.
        tensor: an input.
        dtype: what the kernels compute in; None: the tensor's dtype.
    """
    known = (dtype or tensor.dtype) in (torch.float32, torch.bfloat16, torch.float16)
    if not known or not _triton_is_installed():
        return dict(available)
    if recording():
        return {"triton": kernels, **available}
    if tensor.device.type == "cuda" and torch.cuda.get_device_capability(tensor.device) >= (8, 0):
        return {"triton": kernels, **available}
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return {**available, "triton": kernels}
    return dict(available)


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


def check_shapes(operator: str, **tensors: tuple[Tensor, str]) -> dict[str, int]:
    """Check that tensors agree in their dimensions and live on one device.

    Args:
        operator: name for the message.
        tensors: name → (tensor, its dimensions): letters that stand for one size throughout, or numbers, for example
            `logits=(logits, "B 2 C")`.

    Returns:
        Size of each letter.

    Raises:
        ValueError: naming the tensor that does not fit.
    """
    sizes: dict[str, int] = {}
    device = next(iter(tensors.values()))[0].device
    for name, (tensor, dimensions) in tensors.items():
        letters = dimensions.split()
        expected = [int(letter) if letter.isdigit() else sizes.get(letter) for letter in letters]
        shape = tuple(tensor.shape)
        same_rank = len(shape) == len(letters)
        if not same_rank or any(want not in (None, got) for want, got in zip(expected, shape, strict=True)):
            known = ", ".join(f"{letter}={size}" for letter, size in sizes.items()) or "none"
            raise ValueError(f"{operator}: {name} must be ({', '.join(letters)}), got {shape}; known: {known}")
        if tensor.device != device:
            raise ValueError(f"{operator}: {name} is on {tensor.device}, the other inputs on {device}")
        sizes.update((letter, size) for letter, size in zip(letters, shape, strict=True) if not letter.isdigit())
    return sizes

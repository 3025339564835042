"""Both GRU decoders forward and backward at production shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..cases import HEADS, B, C, Case, D, G, H, N, empty
from .gru import parameter_shapes
from .inputs import Inputs
from .triton import decode, host
from .triton.persistent import Sizes


def _run_in_one_launch(dtype: torch.dtype) -> None:
    with host.use("one"):
        _run(dtype)


def _run(dtype: torch.dtype) -> None:
    decoders = [
        {name: empty(*shape, dtype=dtype).requires_grad_() for name, shape in parameter_shapes(D, H).items()}
        for _ in range(G)
    ]
    features, context = empty(C, D, dtype=dtype), empty(B, D, dtype=dtype)
    outputs = decode(Inputs(decoders, features, context, N, HEADS))
    parameters = [parameter for decoder in decoders for parameter in decoder.values()]
    torch.autograd.grad(outputs, parameters, torch.empty_like(outputs))


def _flops(inputs: int, outputs: int) -> Callable[[Mapping[str, Any]], float]:
    return lambda a: 2.0 * G * a["classes"] * inputs * outputs


def _steps(sizes: Sizes, attention: int) -> float:
    """FLOPs of all steps: five layers, six matrices of the GRU but for the first step, attention to classes, images."""
    layers = sizes.steps * 5 + (sizes.steps - 1) * 6
    attended = attention * sizes.classes + 2 * sizes.heads * sizes.images
    return 2.0 * sizes.decoders * sizes.classes * sizes.hidden * (layers * sizes.hidden + sizes.steps * attended)


CASES = (
    Case(
        "prompt decoder",
        _run,
        flops={
            "gru_kernel": lambda a: 2.0 * G * a["classes"] * H * (0 if a["FIRST"] else 6 * H),
            "linear_kernel": lambda a: 2.0 * G * a["classes"] * a["inputs"] * a["outputs"],
            "self_attention_kernel": lambda a: 2 * 2.0 * len(a["qkv"]) * a["classes"] ** 2 * H,
            "cross_attention_kernel": _flops(H, HEADS * B),
            "cross_attention_backward_kernel": _flops(H, HEADS * B),
            "norm_linear_backward_kernel": _flops(H, H),
            "self_attention_backward_kernel": lambda a: 7 * 2.0 * G * a["classes"] ** 2 * H,
            "gru_backward_kernel": _flops(3 * H, H),
            "recurrence_backward_kernel": _flops(6 * H, H),
        },
    ),
    Case(
        "prompt decoder in one launch",
        _run_in_one_launch,
        flops={
            "forward_kernel": lambda a: _steps(a["sizes"], 2),
            "backward_kernel": lambda a: _steps(a["sizes"], 7),
        },
        may_spill=True,
    ),
)

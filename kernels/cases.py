"""Cases of kernels at production shapes: what `tools.inspect_kernels` compiles and counts, without a GPU.

An operator's cases stand beside its kernels, in `<op>/cases.py`, as `CASES`. They run host code on meta tensors: what
is recorded (`launch.record`) is exactly what would be launched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

B, C, N, D = 64, 108, 16, 1024
"""images, classes, prompt vectors, width of features"""
G, H = 2, 512
"""decoders, their hidden width"""
W, LAYERS = 512, 12
"""width and layers of the text tower"""
HEADS = 8
"""attention heads of the tower and of the decoders"""
PAIRS = 482
"""pairs of a chunk"""


@dataclass(frozen=True)
class Case:
    """Host code that launches kernels."""

    name: str
    run: Callable[[torch.dtype], object]
    """on meta tensors of a dtype"""
    dtypes: tuple[str, ...] = ("bf16",)
    """dtypes of production: bf16, fp16, fp32"""
    flops: Mapping[str, Callable[[Mapping[str, Any]], float]] = field(default_factory=dict)
    """kernel → FLOPs of a launch with the given arguments"""
    trips: Mapping[str, Callable[[Mapping[str, Any]], int]] = field(default_factory=dict)
    """kernel → turns of its longest loop in a launch, over all programs"""
    writes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """kernel → parameters that it writes whole, where that is known"""
    may_spill: bool = False
    """registers may be spilled outside of the loops of products: where functions are called"""


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of the meta device: a shape and a dtype, no numbers."""
    return torch.empty(shape, dtype=dtype, device="meta")

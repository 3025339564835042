"""FLOPs and bytes, counted without running anything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """Counts the FLOPs of matrix products, attention as plain products, which torch's counter knows on every device."""
    # Of baddbmm it knows one form only.
    known = {torch.ops.aten.baddbmm_: lambda into, left, right, **_: 2 * math.prod(left) * right[-1]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=known) as counter:
        yield counter

"""The asymmetric loss and its gradient at production shapes."""

from __future__ import annotations

import torch

from ..cases import B, C, Case, empty
from .triton import run


def _run(dtype: torch.dtype) -> None:
    run(empty(B, 2, C, dtype=dtype), empty(B, C), 1.0, 2.0, 0.05, 1e-6)


CASES = (Case("asymmetric loss", _run, ("fp32", "bf16")),)

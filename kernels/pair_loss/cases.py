"""SPCL of a chunk of pairs and its gradients at production shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..cases import PAIRS, B, C, Case, D, empty
from .triton import run


def _run(dtype: torch.dtype) -> None:
    labels, pairs = empty(B, C), empty(PAIRS, dtype=torch.int64)
    features, vectors = empty(PAIRS, D, dtype=dtype), empty(B, D, dtype=dtype)
    run(features, vectors, empty(), labels, pairs, pairs.clone(), None, 1.0)


def _flops(a: Mapping[str, Any]) -> float:
    return 6 * 2.0 * a["pairs"] * a["images"] * a["width"]


CASES = (Case("SPCL of a chunk", _run, ("fp32", "bf16"), {"_pairs_kernel": _flops, "_vectors_kernel": _flops}),)

"""Settings of torch that decide numbers on a GPU: set here and nowhere else, and recorded with what they decided."""

from __future__ import annotations

import os

import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def fix_numerics(device: torch.device) -> None:
    """Make a GPU repeat a run bit for bit, at the precision that was asked for. On a CPU nothing is to be done.

    - Deterministic algorithms, of torch, cuDNN and cuBLAS (a workspace of fixed size; the user's own stays). An
      operator that has none raises RuntimeError instead of varying. Memory is not filled for that, it would cost time.
    - No search for the fastest convolution: what it finds depends on the moment.
    - float32 is float32, not TF32, in products and convolutions; fp32 is a choice of `precision`, bf16 the fast one.
    - Products of bf16 and fp16 are summed in float32, also where cuBLAS splits a sum.

    It has to be called before the process's first product on a GPU.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def numerics() -> dict[str, bool | str | None]:
    """What the settings of `fix_numerics` are now, for files of results."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn.deterministic": cudnn.deterministic,
        "cudnn.benchmark": cudnn.benchmark,
        "cudnn.allow_tf32": cudnn.allow_tf32,
        "cuda.matmul.allow_tf32": products.allow_tf32,
        "cuda.matmul.allow_bf16_reduced_precision_reduction": products.allow_bf16_reduced_precision_reduction,
        "cuda.matmul.allow_fp16_reduced_precision_reduction": products.allow_fp16_reduced_precision_reduction,
        _WORKSPACE: os.environ.get(_WORKSPACE),
    }

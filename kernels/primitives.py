"""Device functions that several kernels use. They avoid libdevice, which Triton's interpreter does not have."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """First thing of a kernel: with OVERLAP, wait for the kernel before, and let the next one be set up meanwhile.

    No memory may be touched before it: a kernel so launched starts while the one before still runs.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def tanh(x):
    """tanh of float32; absolute error below 2e-7."""
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def softplus(x):
    """ln(1 + eˣ) of float32, without overflow and without losing small values to the 1."""
    y = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0) + tl.where(y < 1e-3, y - 0.5 * y * y, tl.log(1 + y))


@triton.jit
def quick_gelu_gate(x):
    """σ(1.702 x): QuickGELU is x times it."""
    return tl.sigmoid(1.702 * x)

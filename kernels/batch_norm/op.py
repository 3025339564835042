"""The public functions of batch norm."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import check_shapes, resolve, with_triton
from . import eager, reference
from .norm import Norm


def batch_norm(
    x: Tensor, norm: Norm, residual: Tensor | None = None, *, relu: bool = True, impl: str = "auto"
) -> Tensor:
    """relu(batch norm of x in training + residual), and the running statistics brought up to date.

    A channel's mean and variance are those of its B·H·W numbers, in float32 or better (Ioffe and Szegedy 2015). Kernels
    read and write channels last; another memory format is copied into it. For backward they keep x, two numbers a
    channel and, with a residual, the result, which the next layer keeps anyway.

    Args:
        x: (B,C,H,W).
        norm: its statistics are updated in place, also where no gradient is asked for.
        residual: as x, added before the ReLU; None: nothing is.
        relu: False: no ReLU.
        impl: triton (chosen by auto on a GPU), eager (torch's operators), reference, or auto.

    Returns:
        (B,C,H,W) of x's dtype, in channels last from kernels.

    Raises:
        ValueError: shapes, dtypes or an `impl` that do not fit; or channels of one number, whose variance is not known.
    """
    return batch_norm_twice(x, norm, residual, relu=relu, impl=impl)[0]


def batch_norm_twice(
    x: Tensor, norm: Norm, residual: Tensor | None = None, *, relu: bool = True, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The result of `batch_norm` for two readers, such as a block's branch and its shortcut: one memory, two gradients.

    Where a residual was added kernels add these two as they read them; anywhere else autograd or they do in a pass.
    """
    run = resolve(impl, with_triton({"eager": eager.batch_norm, "reference": reference.batch_norm}, _with_kernels, x))
    channels = {name: getattr(norm, name) for name in ("weight", "bias", "running_mean", "running_var")}
    given = {"x": (x, "B C H W"), **{name: (tensor, "C") for name, tensor in channels.items()}}
    if residual is not None:
        given["residual"] = (residual, "B C H W")
        if residual.dtype != x.dtype:
            raise ValueError(f"batch_norm: residual must be {x.dtype} as x is, got {residual.dtype}")
    sizes = check_shapes("batch_norm", **given)
    if sizes["B"] * sizes["H"] * sizes["W"] < 2:
        raise ValueError(f"batch_norm: needs more than one number a channel, got x of shape {tuple(x.shape)}")
    return run(x, norm, residual, relu)


def _with_kernels(x: Tensor, norm: Norm, residual: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    from .triton import batch_norm  # imports triton

    return batch_norm(x, norm, residual, relu)

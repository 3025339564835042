"""The public functions of batch norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..dispatch import check_shapes, resolve, with_triton
from . import eager, reference
from .running import Running


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Running,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """relu(batch norm of x in training + residual), and the running statistics brought up to date.

    A channel's mean and variance are those of its B·H·W numbers, in float32 or better (Ioffe and Szegedy 2015). Kernels
    read and write channels last; another memory format is copied into it. For backward they keep x, two numbers a
    channel and, with a residual, the result, which the next layer keeps anyway.

    Args:
        x: (B,C,H,W).
        weight, bias: (C,), γ and β; of a dtype of their own, float32 under autocast.
        running: updated in place, also where no gradient is asked for.
        residual: as x, added before the ReLU; None: nothing is.
        relu: False: no ReLU.
        momentum: what a batch counts in the running statistics, as in torch.
        eps: added to the variance.
        impl: triton (chosen by auto on a GPU), eager (torch's operators), reference, or auto.

    Returns:
        (B,C,H,W) of x's dtype, in channels last from kernels.

    Raises:
        ValueError: shapes, dtypes or an `impl` that do not fit; or channels of one number, whose variance is not known.
    """
    return batch_norm_twice(x, weight, bias, running, residual, relu=relu, momentum=momentum, eps=eps, impl=impl)[0]


def batch_norm_twice(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Running,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The result of `batch_norm` for two readers, such as a block's branch and its shortcut: one memory, two gradients.

    Where a residual was added kernels add these two as they read them; anywhere else autograd or they do in a pass.
    """
    run = resolve(impl, with_triton({"eager": eager.batch_norm, "reference": reference.batch_norm}, _with_kernels, x))
    channels = {"weight": weight, "bias": bias, "running mean": running.mean, "running variance": running.variance}
    given = {"x": (x, "B C H W"), **{name: (tensor, "C") for name, tensor in channels.items()}}
    if residual is not None:
        given["residual"] = (residual, "B C H W")
        if residual.dtype != x.dtype:
            raise ValueError(f"batch_norm: residual must be {x.dtype} as x is, got {residual.dtype}")
    sizes = check_shapes("batch_norm", **given)
    if sizes["B"] * sizes["H"] * sizes["W"] < 2:
        raise ValueError(f"batch_norm: needs more than one number a channel, got x of shape {tuple(x.shape)}")
    return run(x, weight, bias, running, residual, relu=relu, momentum=momentum, eps=eps)


def _with_kernels(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    from .triton import batch_norm  # imports triton

    return batch_norm(*arguments, **options)

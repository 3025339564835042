"""Asymmetric loss and its gradient in one pass, as a Triton kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import configuration, launch, pin

pin("asymmetric_loss", sm_80={"BLOCK": 512, "num_warps": 4})


@triton.jit
def _kernel(
    logits,  # (B,2,C)
    labels,  # (B,C)
    gradient,  # (B,2,C)
    partial,  # (2,programs) float32: losses, labels kept
    count,  # B·C
    classes,
    gamma_positive,
    gamma_negative,
    clip,
    eps,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    index = program * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    positive_offsets = index + index // classes * classes  # b·2C + c
    negative_offsets = positive_offsets + classes
    z = tl.load(logits + positive_offsets, mask=mask, other=0).to(tl.float32)
    z -= tl.load(logits + negative_offsets, mask=mask, other=0).to(tl.float32)
    label = tl.load(labels + index, mask=mask, other=-1)
    positive, kept = label == 1, label >= 0

    p, complement = tl.sigmoid(z), tl.sigmoid(-z)
    shifted = complement + clip
    true = tl.where(positive, p, tl.minimum(shifted, 1.0))
    gamma = tl.where(positive, gamma_positive, gamma_negative)
    base = tl.where(positive, complement, 1 - tl.minimum(shifted, 1.0))
    focus = tl.where(base > 0, tl.exp(gamma * tl.log(tl.where(base > 0, base, 1.0))), 0.0)
    focus = tl.where(gamma == 0, 1.0, focus)
    loss = tl.where(kept, -focus * tl.log(tl.maximum(true, eps)), 0.0)
    # Zero where the logarithm is floored, and for negatives where the shift reaches 1.
    d_positive = tl.where(p >= eps, -focus * complement, 0.0)
    d_negative = tl.where((true >= eps) & (shifted <= 1), focus * p * complement / tl.maximum(true, eps), 0.0)
    d = tl.where(kept, tl.where(positive, d_positive, d_negative), 0.0)
    tl.store(gradient + positive_offsets, d.to(gradient.dtype.element_ty), mask=mask)
    tl.store(gradient + negative_offsets, (-d).to(gradient.dtype.element_ty), mask=mask)
    tl.store(partial + program, tl.sum(loss, 0))
    tl.store(partial + tl.num_programs(0) + program, tl.sum(kept.to(tl.float32), 0))


def run(
    logits: Tensor, labels: Tensor, gamma_positive: float, gamma_negative: float, clip: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses and number of labels not left out, float32 scalars, and (B,2,C) gradient of the sum."""
    logits, labels = logits.contiguous(), labels.contiguous()
    classes, count = logits.shape[2], labels.numel()
    options = configuration("asymmetric_loss", logits.device)
    programs = triton.cdiv(count, options["BLOCK"])
    gradient = torch.empty_like(logits)
    partial = logits.new_empty((2, programs), dtype=torch.float32)
    launch(
        _kernel,
        (programs,),
        *(logits, labels, gradient, partial),
        *(count, classes, gamma_positive, gamma_negative, clip, eps),
        **options,
    )
    total, kept = partial.sum(1)
    return total.clone(), kept.clone(), gradient


_asymmetric_loss = torch.library.custom_op("pspg::asymmetric_loss", run, mutates_args=())


@_asymmetric_loss.register_fake
def _(logits: Tensor, labels: Tensor, *_: float) -> tuple[Tensor, Tensor, Tensor]:
    scalar = logits.new_empty((), dtype=torch.float32)
    return scalar, scalar.clone(), torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros are written for what is saved


def _backward(ctx: Any, d_total: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (gradient * d_total).to(gradient.dtype), None, None, None, None, None


_asymmetric_loss.register_autograd(_backward, setup_context=_save)


def asymmetric_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    gamma_positive: float,
    gamma_negative: float,
    clip: float,
    eps: float,
    reduction: str,
) -> Tensor:
    """Asymmetric loss; arguments and result as `op.asymmetric_loss`."""
    total, kept, _ = _asymmetric_loss(logits, labels, gamma_positive, gamma_negative, clip, eps)
    return total if reduction == "sum" else total / kept.clamp(min=1)

"""SPCL of pair features with all its gradients, as Triton kernels; the (B,P) logits stay in registers.

One kernel takes blocks of pairs through norm, similarity, maximum over the batch, target and loss to the gradients of
their features and of the temperature; a second one sums the image vectors' gradients over the pairs in a fixed order.
Products are three of TF32 each: a single one would be off by ±0.3 at logits of ±700.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import configuration, launch, pin
from ..pairs import number_of_pairs
from ..primitives import softplus

pin(
    "pair_loss",
    sm_80={"BLOCK_R": 16, "BLOCK_B": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2},
    sm_100={"BLOCK_R": 16, "BLOCK_B": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2},  # a longer block spills
)
pin("pair_loss_vectors", sm_80={"BLOCK_R": 16, "BLOCK_B": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2})
_SPLIT = 256
"""pairs that a program of the second kernel sums over"""


@triton.jit
def _pairs_kernel(
    features,  # (R,D)
    vectors,  # (B,D)
    scale,  # one element: θ
    labels,  # (B,C)
    first,  # (R,) int64
    second,
    weights,  # (R,) or None
    d_features,  # (R,D)
    argmax,  # (R,) int32: image with the largest logit
    coefficient,  # (R,) float32: what its vector's gradient takes of the pair's feature
    partial,  # (2,programs): losses, gradients of θ
    pairs,
    images,
    classes,
    width,
    factor,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    r = program * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = r < pairs
    row = r.to(tl.int64) * width
    i = tl.load(first + r, mask=mask_r, other=0)
    j = tl.load(second + r, mask=mask_r, other=0)
    d = tl.arange(0, BLOCK_D)

    squared = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, width, BLOCK_D):
        mask = mask_r[:, None] & (start + d < width)[None, :]
        w = tl.load(features + row[:, None] + (start + d)[None, :], mask=mask, other=0).to(tl.float32)
        squared += tl.sum(w * w, 1)
    inverse = 1 / tl.maximum(tl.sqrt(squared), 1e-12)

    row_max = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    best = tl.zeros((BLOCK_R,), tl.int32)
    both = tl.zeros((BLOCK_R,), tl.int32)
    for low in range(0, images, BLOCK_B):
        b = low + tl.arange(0, BLOCK_B)
        similarity = tl.zeros((BLOCK_R, BLOCK_B), tl.float32)
        for start in range(0, width, BLOCK_D):
            inside = start + d < width
            w = tl.load(
                features + row[:, None] + (start + d)[None, :], mask=mask_r[:, None] & inside[None, :], other=0
            ).to(tl.float32)
            v = tl.load(
                vectors + b[None, :] * width + (start + d)[:, None],
                mask=(b < images)[None, :] & inside[:, None],
                other=0,
            ).to(tl.float32)
            similarity += tl.dot(w, v, input_precision="tf32x3")
        similarity = tl.where((b < images)[None, :], similarity, float("-inf"))
        top, index = tl.max(similarity, 1, return_indices=True)
        best = tl.where(top > row_max, low + index, best)
        row_max = tl.maximum(row_max, top)
        mask = mask_r[:, None] & (b < images)[None, :]
        label_i = tl.load(labels + b[None, :] * classes + i[:, None], mask=mask, other=0)
        label_j = tl.load(labels + b[None, :] * classes + j[:, None], mask=mask, other=0)
        both = tl.maximum(both, tl.max(((label_i == 1) & (label_j == 1)).to(tl.int32), 1))

    temperature = tl.exp(tl.load(scale).to(tl.float32))
    z = tl.where(mask_r, temperature * row_max * inverse, 0.0)
    weight = tl.where(mask_r, factor, 0.0)
    if weights is not None:
        weight *= tl.load(weights + r, mask=mask_r, other=0).to(tl.float32)
    q = both.to(tl.float32)
    delta = weight * (tl.sigmoid(z) - q)
    tl.store(partial + program, tl.sum(weight * (softplus(z) - q * z), 0))
    tl.store(partial + tl.num_programs(0) + program, tl.sum(delta * z, 0))
    toward = temperature * delta * inverse
    tl.store(argmax + r, best, mask=mask_r)
    tl.store(coefficient + r, toward, mask=mask_r)
    shrinkage = delta * z * inverse * inverse
    for start in range(0, width, BLOCK_D):
        mask = mask_r[:, None] & (start + d < width)[None, :]
        offsets = row[:, None] + (start + d)[None, :]
        w = tl.load(features + offsets, mask=mask, other=0).to(tl.float32)
        v = tl.load(vectors + best[:, None] * width + (start + d)[None, :], mask=mask, other=0).to(tl.float32)
        gradient = toward[:, None] * v - shrinkage[:, None] * w
        tl.store(d_features + offsets, gradient.to(d_features.dtype.element_ty), mask=mask)


@triton.jit
def _vectors_kernel(
    features,  # (R,D)
    argmax,  # (R,) int32
    coefficient,  # (R,) float32
    d_vectors,  # (splits,B,D) float32
    pairs,
    images,
    width,
    SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    low = tl.program_id(2) * SPLIT
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for start in range(low, low + SPLIT, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask_r = r < pairs
        image = tl.load(argmax + r, mask=mask_r, other=-1)
        share = tl.load(coefficient + r, mask=mask_r, other=0)
        mask = mask_r[:, None] & (d < width)[None, :]
        w = tl.load(features + r.to(tl.int64)[:, None] * width + d[None, :], mask=mask, other=0).to(tl.float32)
        # One pair a column, its coefficient at the image that attained the maximum.
        chosen = tl.where(image[None, :] == b[:, None], share[None, :], 0.0)
        total += tl.dot(chosen, w, input_precision="tf32x3")
    offsets = (tl.program_id(2) * images + b)[:, None] * width + d[None, :]
    tl.store(d_vectors + offsets, total, mask=(b < images)[:, None] & (d < width)[None, :])


def run(
    features: Tensor,
    vectors: Tensor,
    scale: Tensor,
    labels: Tensor,
    first: Tensor,
    second: Tensor,
    weights: Tensor | None,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss times `factor`, and its gradients by features, vectors and scale (the latter two float32)."""
    features, vectors, labels, first, second = (t.contiguous() for t in (features, vectors, labels, first, second))
    weights = None if weights is None else weights.contiguous()
    (pairs, width), (images, classes) = features.shape, labels.shape
    device = features.device

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return features.new_empty(shape, dtype=dtype)

    options = configuration("pair_loss", device)
    programs = triton.cdiv(pairs, options["BLOCK_R"])
    partial, d_features = empty(2, programs), torch.empty_like(features)
    argmax, coefficient = empty(pairs, dtype=torch.int32), empty(pairs)
    launch(
        _pairs_kernel,
        (programs,),
        *(features, vectors, scale, labels, first, second, weights),
        *(d_features, argmax, coefficient, partial),
        *(pairs, images, classes, width, factor),
        **options,
    )
    options = configuration("pair_loss_vectors", device)
    splits = max(triton.cdiv(pairs, _SPLIT), 1)
    d_vectors = empty(splits, images, width)
    grid = (triton.cdiv(images, options["BLOCK_B"]), triton.cdiv(width, options["BLOCK_D"]), splits)
    launch(
        _vectors_kernel,
        grid,
        *(features, argmax, coefficient, d_vectors),
        *(pairs, images, width),
        SPLIT=_SPLIT,
        **options,
    )
    loss, d_scale = partial.sum(1)
    return loss.clone(), d_features, d_vectors.sum(0), d_scale.clone()


_pair_loss = torch.library.custom_op("pspg::pair_loss", run, mutates_args=())


@_pair_loss.register_fake
def _(features: Tensor, vectors: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scalar = features.new_empty((), dtype=torch.float32)
    d_vectors = vectors.new_empty(vectors.shape, dtype=torch.float32)
    return scalar, torch.empty_like(features, memory_format=torch.contiguous_format), d_vectors, scalar.clone()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros are written for what is saved
    ctx.like = [(tensor.dtype, tensor.shape) for tensor in inputs[:3]]


def _backward(ctx: Any, d_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    found = zip(ctx.saved_tensors, ctx.like, strict=True)
    return *((part * d_loss).to(dtype).view(shape) for part, (dtype, shape) in found), None, None, None, None, None


_pair_loss.register_autograd(_backward, setup_context=_save)


def pair_loss(
    pair_features: Tensor,
    image_vectors: Tensor,
    logit_scale: Tensor,
    labels: Tensor,
    first: Tensor,
    second: Tensor,
    weights: Tensor | None,
    *,
    target: str,
    reduction: str,
) -> Tensor:
    """SPCL; arguments and result as `reference.pair_loss`, with `target="batch"`."""
    if target != "batch":
        raise ValueError(f"pair_loss: no kernel for target {target!r}")
    factor = 1.0 if reduction == "sum" else 1 / max(number_of_pairs(labels.shape[1]), 1)
    return _pair_loss(pair_features, image_vectors, logit_scale, labels, first, second, weights, factor)[0]

"""The steps of the GRU prompt decoder as torch operators, all decoders at once; exact in real arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import at_least_fp32
from . import folding
from .inputs import Inputs
from .recurrence import (
    RecomputedActivations,
    SavedActivations,
    StepGradients,
    StepImplementation,
    StepWeights,
    empty_outputs,
    empty_saved,
    mix,
)
from .stacked import affine, merge, split

_FEW = 32
"""rows: with 28 the product from the left is 1.2 times as fast, with 56 it is slower (one core, MKL, float32)"""


def decode(inputs: Inputs) -> Tensor:
    """Outputs o_1…o_n of G decoders, as `op.decode`. They can be differentiated once."""
    return folding.decode(inputs, StepImplementation(forward_steps, backward_steps, folded_only=False))


def forward_steps(weights: StepWeights, n: int, heads: int, save: bool) -> tuple[Tensor, SavedActivations | None]:
    """Outputs (G,n,C,F), and the activations of every step, where they are saved for backward."""
    (count, classes, _), hidden = weights.start.shape, weights.out.shape[-1]
    dtype, state = weights.start.dtype, weights.scale.dtype
    outputs = empty_outputs(weights, n)
    saved = empty_saved(weights, n, outputs) if save else None
    x, u = weights.start, weights.recurrent_bias[:, None].expand(-1, classes, -1)  # h_0 = 0
    h = weights.start.new_zeros(count, classes, hidden, dtype=state)
    for i in range(n):
        gates = _gates(x, u, weights.start.new_empty(count, classes, 4 * hidden, dtype=state))
        h = torch.lerp(gates[..., 3 * hidden :], h, gates[..., 2 * hidden : 3 * hidden])
        qkv = _affine(h.to(dtype), weights.qkv, weights.qkv_bias)
        pre_norm_1 = _accumulate(h + weights.out_bias[:, None], _self_attention(qkv, heads), weights.out.mT)
        normed_1 = F.layer_norm(pre_norm_1, (hidden,)).to(dtype)
        pre_norm_2 = _accumulate(h + weights.y_bias[:, None], normed_1, weights.y.mT)
        h = torch.addcmul(weights.shift[:, None], F.layer_norm(pre_norm_2, (hidden,)), weights.scale[:, None])
        query = h.to(dtype)
        scores = _affine(query, weights.query, weights.query_bias)
        summed = torch.baddbmm(query, mix(weights, scores, heads).to(dtype), weights.value)
        fc, fc_bias = weights.fc, weights.fc_bias
        output = summed if fc is None or fc_bias is None else _affine(summed, fc, fc_bias)
        outputs[:, i] = output
        if saved is not None:  # products write whole tensors, which is faster than writing into a step's place
            for buffers, part in zip(saved, (gates, qkv, pre_norm_1, pre_norm_2, scores, summed), strict=True):
                if buffers is not outputs:
                    buffers[:, i] = part
        if i + 1 < n:
            x = _affine(output, weights.feedback, weights.feedback_bias)
            u = _affine(query, weights.recurrent, weights.recurrent_bias)
    return outputs, saved


def backward_steps(
    weights: StepWeights, saved: SavedActivations, recomputed: RecomputedActivations, gradient: Tensor, heads: int
) -> StepGradients:
    """Go back over the steps, each from the gradients of the one after."""
    count, n = saved.summed.shape[:2]
    hidden, dtype, state = saved.pre_norm_1.shape[-1], saved.qkv.dtype, weights.scale.dtype
    z = saved.gates[..., 2 * hidden : 3 * hidden]
    factors = _gate_factors(saved.gates, recomputed.h[:, :-1])
    d_outputs = torch.empty_like(gradient, memory_format=torch.contiguous_format)
    d_summed = d_outputs if weights.fc is None else torch.empty_like(saved.summed)
    d_gates = factors if state == dtype else torch.empty_like(factors, dtype=dtype)
    d_qkv, d_pre_norm_1, d_pre_norm_2, d_scores = (torch.empty_like(part, dtype=dtype) for part in saved[1:5])
    d_h = torch.empty_like(saved.pre_norm_2)
    memory = None if weights.keys is None or weights.values is None else (weights.keys, weights.values)
    d_memory = [] if memory is None else [torch.zeros_like(part, dtype=state) for part in memory]
    d_state = torch.zeros_like(saved.pre_norm_2[:, 0])
    d_output = gradient[:, -1]
    for i in reversed(range(n)):
        d_outputs[:, i] = d_output
        d_sum = d_output if weights.fc is None else torch.bmm(d_output, weights.fc)
        if weights.fc is not None:
            d_summed[:, i] = d_sum

        # Cross-attention to the images.
        d_mixed = torch.bmm(d_sum, weights.value.mT)
        if memory is None:
            d_softmax = d_mixed.to(state).unflatten(-1, (heads, -1))
            softmax = recomputed.mixed[:, i].unflatten(-1, (heads, -1))
            d_scores[:, i] = _softmax_backward(d_softmax, softmax).flatten(2)
        else:
            d_mixed, query = (_heads_first(part, 1, heads)[0] for part in (d_mixed, saved.scores[:, i]))
            keys, values = (part.flatten(0, 1) for part in memory)
            d_query, *parts = _attention_backward(d_mixed, query, keys, values, 1.0)
            d_scores[:, i] = merge(d_query.unflatten(0, (count, heads)))
            for target, part in zip(d_memory, parts, strict=True):
                target += part.view_as(target)
        d_state = _accumulate(d_state.add_(d_sum), d_scores[:, i], weights.query)
        d_h[:, i] = d_state

        # Both LayerNorms and attention between the classes.
        mean_1, rstd_1, mean_2, rstd_2 = (
            part[i] for part in (recomputed.mean_1, recomputed.rstd_1, recomputed.mean_2, recomputed.rstd_2)
        )
        d_inner = _layer_norm_backward(d_state * weights.scale[:, None], saved.pre_norm_2[:, i], mean_2, rstd_2)
        d_pre_norm_2[:, i] = d_inner
        d_normed_1 = torch.bmm(d_pre_norm_2[:, i], weights.y).to(state)
        d_residual = _layer_norm_backward(d_normed_1, saved.pre_norm_1[:, i], mean_1, rstd_1)
        d_pre_norm_1[:, i] = d_residual
        d_inner.add_(d_residual)
        (d_attended,) = _heads_first(torch.bmm(d_pre_norm_1[:, i], weights.out), 1, heads)
        q, k, v = _heads_first(saved.qkv[:, i], 3, heads)
        parts = list(_attention_backward(d_attended, q, k, v, q.shape[-1] ** -0.5))
        for target, part in zip(d_qkv[:, i].chunk(3, dim=-1), parts, strict=True):
            target.unflatten(-1, (heads, -1)).copy_(part.unflatten(0, (count, heads)).transpose(1, 2))
        _accumulate(d_inner, d_qkv[:, i], weights.qkv)

        # GRU cell, and on to the step before.
        four = (-1, (4, hidden))
        torch.mul(factors[:, i].unflatten(*four), d_inner[:, :, None], out=d_gates[:, i].unflatten(*four))
        if i > 0:
            d_state = _accumulate(d_inner * z[:, i], d_gates[:, i, :, : 3 * hidden], weights.recurrent)
            d_output = torch.baddbmm(gradient[:, i - 1], d_gates[:, i, :, hidden:], weights.feedback)

    d_keys, d_values = [part.to(dtype) for part in d_memory] or (None, None)
    return StepGradients(
        outputs=d_outputs,
        gates=d_gates,
        qkv=d_qkv,
        pre_norm_1=d_pre_norm_1,
        pre_norm_2=d_pre_norm_2,
        scores=d_scores,
        summed=d_summed,
        h=d_h,
        keys=d_keys,
        values=d_values,
        attended=_self_attention(saved.qkv.flatten(0, 1), heads).unflatten(0, (count, n)),
    )


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`affine`; few rows on a CPU are multiplied from the other side, up to 2.6 times as fast as by a transpose."""
    if x.device.type == "cpu" and x.shape[1] <= _FEW:
        return torch.baddbmm(bias[..., None], weight, x.mT).mT.contiguous()
    return affine(x, weight, bias)


def _gates(x: Tensor, u: Tensor, gates: Tensor) -> Tensor:
    """Write u, r, z, n of a step to `gates` (G,C,4H), from x = W_ih·x + b_ih and u = W_hh·h + b_hh."""
    hidden = gates.shape[-1] // 4
    rz, n = gates[..., hidden : 3 * hidden], gates[..., 3 * hidden :]
    gates[..., hidden:] = x
    gates[..., :hidden] = u[..., :hidden]
    rz.add_(u[..., hidden:]).sigmoid_()
    n.addcmul_(rz[..., :hidden], gates[..., :hidden]).tanh_()
    return gates


def _gate_factors(gates: Tensor, h: Tensor) -> Tensor:
    """Derivatives of the GRU cell's output n + z⊙(h − n) by each gate before its nonlinearity, (…,4H)."""
    factors = torch.empty_like(gates)
    (u, r, z, n), (d_u, d_r, d_z, d_n) = gates.chunk(4, dim=-1), factors.chunk(4, dim=-1)
    torch.mul(1 - z, 1 - n * n, out=d_n)
    torch.mul(d_n, r, out=d_u)
    torch.mul(d_u * (1 - r), u, out=d_r)
    torch.mul((h - n) * (1 - z), z, out=d_z)
    return factors


def _self_attention(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention of (A,C,3H), (A,C,H), before its output projection."""
    q, k, v = (split(part, heads) for part in qkv.chunk(3, dim=-1))
    return merge(F.scaled_dot_product_attention(q, k, v))


def _attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v of softmax(q·kᵀ·factor)·v, all (A,rows,H/heads)."""
    ignored = q.new_empty(1)  # baddbmm with beta = 0: a product times a number
    weights = torch.softmax(
        torch.baddbmm(ignored, q, k.mT, beta=0, alpha=factor), dim=-1, dtype=at_least_fp32(ignored).dtype
    )
    d_scores = _softmax_backward(torch.bmm(gradient, v.mT).to(weights.dtype), weights).to(q.dtype)
    d_q, d_k = (
        torch.baddbmm(ignored, left, right, beta=0, alpha=factor) for left, right in ((d_scores, k), (d_scores.mT, q))
    )
    return d_q, d_k, torch.bmm(weights.to(q.dtype).mT, gradient)


def _softmax_backward(gradient: Tensor, weights: Tensor) -> Tensor:
    """weights⊙(gradient − Σ weights⊙gradient) over the last dimension."""
    return torch.ops.aten._softmax_backward_data(gradient, weights, -1, weights.dtype)


def _layer_norm_backward(gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return torch.ops.aten.native_layer_norm_backward(
        gradient, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
    )[0]


def _accumulate(into: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Add x·weight to `into`, also where the product is of a shorter type."""
    return into.baddbmm_(x, weight) if into.dtype == x.dtype else into.add_(torch.bmm(x, weight))


def _heads_first(rows: Tensor, parts: int, heads: int) -> Tensor:
    """(G,R,parts·H) as (parts,G·heads,R,H/heads), one copy."""
    return rows.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)

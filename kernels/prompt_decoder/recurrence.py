"""The n steps of the GRU prompt decoder as one differentiable function, whatever implements the steps.

Going back over the steps forms input gradients only; each weight gradient is one product over the rows of all steps
afterwards. MATH.md, section "Prompt decoder", has the derivation. G decoders, C classes, H hidden width, B images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..precision import no_autocast
from .stacked import merge, split

EPS = 1e-5
"""epsilon of LayerNorm, as F.layer_norm has it"""


class StepWeights(NamedTuple):
    """Weights and constants that the steps read. Gates are u = W_hn·h + b_hn, r, z, n.

    F is H where W_ih·W_fc is one matrix, else D; M is heads·B where cross-attention is folded, else H.
    """

    start: Tensor  # (G,C,3H) W_ih·x_0 + b_ih
    feedback: Tensor  # (G,3H,F) to r, z, n
    feedback_bias: Tensor
    fc: Tensor | None  # (G,D,H); None where folded into `feedback`
    fc_bias: Tensor | None
    recurrent: Tensor  # (G,3H,H) to u, r, z
    recurrent_bias: Tensor
    qkv: Tensor  # (G,3H,H)
    qkv_bias: Tensor
    out: Tensor  # (G,H,H)
    out_bias: Tensor
    y: Tensor  # (G,H,H)
    y_bias: Tensor
    scale: Tensor  # (G,H)
    shift: Tensor
    query: Tensor  # (G,M,H)
    query_bias: Tensor
    value: Tensor  # (G,M,H), input first
    keys: Tensor | None  # (G,heads,B,H/heads) over √(H/heads); None where folded
    values: Tensor | None


class SavedActivations(NamedTuple):
    """Activations that backward needs of every step, (G,n,C,…)."""

    gates: Tensor  # u, r, z, n
    qkv: Tensor
    pre_norm_1: Tensor  # what the first LayerNorm reads
    pre_norm_2: Tensor
    scores: Tensor  # h·queryᵀ + query_bias: of the images, or queries where cross-attention is not folded
    summed: Tensor  # h and what it attended to in the images


class RecomputedActivations(NamedTuple):
    """Activations that backward recomputes for all steps at once, in the dtype of the state."""

    h: Tensor  # (G,n+1,C,H) h_0…h_n
    normed_1: Tensor  # (G,n,C,H) the first LayerNorm, without scale and shift
    mean_1: Tensor  # (n,G,C,1) contiguous, as are the next one and the two of the second norm
    rstd_1: Tensor
    normed_2: Tensor
    mean_2: Tensor
    rstd_2: Tensor
    mixed: Tensor  # (G,n,C,M) what `value` multiplies


class StepGradients(NamedTuple):
    """Gradients of what every step computes, (G,n,C,…), and what else the gradients of the weights need."""

    outputs: Tensor
    gates: Tensor  # before their nonlinearities
    qkv: Tensor
    pre_norm_1: Tensor
    pre_norm_2: Tensor
    scores: Tensor
    summed: Tensor
    h: Tensor  # of h_1…h_n, in the dtype of the state
    keys: Tensor | None
    values: Tensor | None
    attended: Tensor  # no gradient: what self-attention returned


class StepImplementation(NamedTuple):
    """The n steps forward and backward."""

    forward: Callable[[StepWeights, int, int, bool], tuple[Tensor, SavedActivations | None]]
    """(weights, n, heads, save) → outputs (G,n,C,F), and activations where they are saved"""
    backward: Callable[[StepWeights, SavedActivations, RecomputedActivations, Tensor, int], StepGradients]
    """(weights, saved, recomputed, gradient of the outputs, heads)"""
    folded_only: bool
    """true where the steps know folded weights only"""


def run_steps(implementation: StepImplementation, n: int, heads: int, weights: StepWeights) -> Tensor:
    """Outputs (G,n,C,F): o_i, or what `fc` makes o_i of where that is folded. They can be differentiated once."""
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in weights):
        return _Steps.apply(implementation, n, heads, *weights)
    return implementation.forward(weights, n, heads, False)[0]


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, implementation: StepImplementation, n: int, heads: int, *tensors: Tensor) -> Tensor:
        weights = StepWeights(*tensors)
        with no_autocast(weights.start):
            outputs, saved = implementation.forward(weights, n, heads, True)
        assert saved is not None
        ctx.save_for_backward(outputs, *saved, *weights)
        ctx.implementation, ctx.heads = implementation, heads
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        outputs, *rest = ctx.saved_tensors
        size = len(SavedActivations._fields)
        saved, weights = SavedActivations(*rest[:size]), StepWeights(*rest[size:])
        wanted = StepWeights(*ctx.needs_input_grad[3:])
        with no_autocast(gradient):
            recomputed = _recompute(weights, saved, ctx.heads)
            steps = ctx.implementation.backward(weights, saved, recomputed, gradient, ctx.heads)
            gradients = _weight_gradients(weights, saved, recomputed, steps, wanted, outputs)
        return None, None, None, *gradients


def empty_outputs(weights: StepWeights, n: int) -> Tensor:
    """Buffer for the outputs of n steps, (G,n,C,F)."""
    return weights.start.new_empty(*_sizes(weights, n), weights.feedback.shape[-1])


def empty_saved(weights: StepWeights, n: int, outputs: Tensor) -> SavedActivations:
    """Buffers for n steps; `summed` is `outputs` where these are not what `fc` returned."""
    hidden, state = weights.out.shape[-1], weights.scale.dtype

    def buffer(width: int, dtype: torch.dtype = weights.start.dtype) -> Tensor:
        return weights.start.new_empty(*_sizes(weights, n), width, dtype=dtype)

    return SavedActivations(
        gates=buffer(4 * hidden, state),
        qkv=buffer(3 * hidden),
        pre_norm_1=buffer(hidden, state),
        pre_norm_2=buffer(hidden, state),
        scores=buffer(weights.query.shape[1]),
        summed=outputs if weights.fc is None else buffer(hidden),
    )


def mix(weights: StepWeights, scores: Tensor, heads: int) -> Tensor:
    """Rows that `value` multiplies, (G,R,M): softmax over the images; where these are not folded, mixed values."""
    if weights.keys is None or weights.values is None:
        return torch.softmax(scores.unflatten(-1, (heads, -1)), dim=-1, dtype=weights.scale.dtype).flatten(2)
    return merge(F.scaled_dot_product_attention(split(scores, heads), weights.keys, weights.values, scale=1.0))


def _recompute(weights: StepWeights, saved: SavedActivations, heads: int) -> RecomputedActivations:
    n, hidden = saved.pre_norm_1.shape[1], saved.pre_norm_1.shape[-1]
    normed_1, *statistics_1 = torch.native_layer_norm(saved.pre_norm_1, (hidden,), None, None, EPS)
    normed_2, *statistics_2 = torch.native_layer_norm(saved.pre_norm_2, (hidden,), None, None, EPS)
    # Step first: on a CPU the backward of LayerNorm reads its statistics as if they were contiguous.
    mean_1, rstd_1, mean_2, rstd_2 = (part.transpose(0, 1).contiguous() for part in (*statistics_1, *statistics_2))
    h = normed_2.new_empty(*_sizes(weights, n + 1), hidden)
    h[:, 0] = 0
    torch.addcmul(weights.shift[:, None, None], normed_2, weights.scale[:, None, None], out=h[:, 1:])
    mixed = mix(weights, saved.scores.flatten(1, 2), heads).unflatten(1, saved.scores.shape[1:3])
    return RecomputedActivations(h, normed_1, mean_1, rstd_1, normed_2, mean_2, rstd_2, mixed)


def _sizes(weights: StepWeights, n: int) -> tuple[int, int, int]:
    return weights.start.shape[0], n, weights.start.shape[1]


def _weight_gradients(
    weights: StepWeights,
    saved: SavedActivations,
    recomputed: RecomputedActivations,
    steps: StepGradients,
    wanted: StepWeights,
    outputs: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of `weights`, in its order, over the rows of all steps; of the matrices those `wanted`."""
    hidden, dtype = saved.pre_norm_1.shape[-1], outputs.dtype
    z, candidate = saved.gates.chunk(4, dim=-1)[2:]

    def product(left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(left.flatten(1, 2).mT, right.flatten(1, 2))

    def total(part: Tensor, like: Tensor) -> Tensor:
        return part.sum((1, 2), dtype=like.dtype)

    inner = torch.lerp(candidate, recomputed.h[:, :-1], z).to(dtype)  # what the GRU cell returned
    h = recomputed.h.to(dtype)
    d_u, d_x = steps.gates[..., : 3 * hidden], steps.gates[..., hidden:]
    gradients: dict[str, Tensor | None] = {
        "start": d_x[:, 0],
        "feedback": product(d_x[:, 1:], outputs[:, :-1]) if wanted.feedback else None,
        "feedback_bias": total(d_x[:, 1:], weights.feedback_bias),
        "fc": product(steps.outputs, saved.summed) if wanted.fc else None,
        "fc_bias": None if weights.fc_bias is None else total(steps.outputs, weights.fc_bias),
        "recurrent": product(d_u[:, 1:], h[:, 1:-1]) if wanted.recurrent else None,
        "recurrent_bias": total(d_u, weights.recurrent_bias),
        "qkv": product(steps.qkv, inner) if wanted.qkv else None,
        "qkv_bias": total(steps.qkv, weights.qkv_bias),
        "out": product(steps.pre_norm_1, steps.attended) if wanted.out else None,
        "out_bias": total(steps.pre_norm_1, weights.out_bias),
        "y": product(steps.pre_norm_2, recomputed.normed_1.to(dtype)) if wanted.y else None,
        "y_bias": total(steps.pre_norm_2, weights.y_bias),
        "scale": total(recomputed.normed_2.mul_(steps.h), weights.scale),
        "shift": total(steps.h, weights.shift),
        "query": product(steps.scores, h[:, 1:]) if wanted.query else None,
        "query_bias": total(steps.scores, weights.query_bias),
        "value": product(recomputed.mixed.to(dtype), steps.summed) if wanted.value else None,
        "keys": steps.keys,
        "values": steps.values,
    }
    return tuple(gradients[name] for name in StepWeights._fields)

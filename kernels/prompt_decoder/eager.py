"""The prompt decoder without repeated work, all decoders at once; exact in real arithmetic.

Keys and values of the images are projected once, not at every step, and where that is cheaper the projections around
them are folded into them. The input of step i+1 is affine in what step i passes to `fc`, so W_ih·W_fc is one matrix and
the outputs themselves are one product after the loop. The loop has a backward of its own: going back over the steps it
forms input gradients only, each weight gradient is one product over the rows of all steps afterwards. MATH.md, section
"Prompt decoder", has the derivations. The steps are torch operators here and kernels in `triton/`; the rest is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..precision import at_least_fp32, compute_dtype, no_autocast
from .reference import Decoder
from .stacked import affine, merge, split

EPS = 1e-5  # of F.layer_norm


def decode(
    decoders: Sequence[Decoder],
    class_features: Tensor,
    context: Tensor,
    *,
    prompt_length: int,
    heads: int,
    steps: Steps | None = None,
) -> Tensor:
    """Outputs o_1…o_n of G decoders; arguments and result as `op.decode`. Shapes below: G decoders, C classes.

    Under autocast products run in autocast's dtype, which is also the result's; the state, gates, LayerNorm and softmax
    stay in float32. The result can be differentiated once.

    Args:
        steps: kernels for the n steps, for which everything is folded that can be; None: torch operators.
    """
    count, classes, n = len(decoders), len(class_features), prompt_length
    dtype = compute_dtype(class_features)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype)

    def stacked(name: str) -> Tensor:
        return torch.stack([decoder[name] for decoder in decoders])

    def cast_stacked(name: str) -> Tensor:
        return cast(stacked(name))

    def turned(name: str) -> Tensor:
        """Rows n, r, z: then the gates u, r, z, n are one block that W_hh and W_ih (r, z, n) overlap in."""
        hidden = decoders[0][name].shape[0] // 3
        parts = [part for decoder in decoders for part in decoder[name].split([2 * hidden, hidden])[::-1]]
        return torch.cat(parts).unflatten(0, (count, -1))

    with no_autocast(class_features):
        w_ih, w_fc, b_ih = cast_stacked("gru.weight_ih"), cast_stacked("fc.weight"), stacked("gru.bias_ih")
        hidden = b_ih.shape[-1] // 3
        w_cross, b_cross = (
            cast_stacked("encoder_attention.in_proj_weight"),
            cast_stacked("encoder_attention.in_proj_bias"),
        )
        w_o, b_o = cast_stacked("encoder_attention.out_proj.weight"), stacked("encoder_attention.out_proj.bias")
        # h + attended + b_o goes through fc only: b_o moves into the bias of fc.
        b_fc = _times(w_fc, cast(b_o)) + stacked("fc.bias")

        c = affine(
            cast(context).expand(count, -1, -1), cast_stacked("encoder_proj.weight"), cast_stacked("encoder_proj.bias")
        )  # (G,B,H)
        (query, w_memory), (query_bias, b_memory) = (part.split([hidden, 2 * hidden], 1) for part in (w_cross, b_cross))
        keys, values = (split(part, heads) for part in affine(c, w_memory, b_memory).chunk(2, dim=-1))
        keys, value = keys * keys.shape[-1] ** -0.5, w_o.mT
        if steps is not None or cross_fold_is_cheaper(
            images=len(context), rows=classes * n, hidden=hidden, heads=heads
        ):
            query, query_bias = (
                (keys @ part).flatten(1, 2)
                for part in (query.unflatten(1, (heads, -1)), query_bias.unflatten(1, (heads, -1, 1)))
            )
            query_bias, value = query_bias[..., 0], (values @ value.unflatten(1, (heads, -1))).flatten(1, 2)
            memory: tuple[Tensor | None, Tensor | None] = (None, None)
        else:
            memory = keys.contiguous(), values.contiguous()

        # Anywhere but on a CPU steps wait for one another, not for FLOPs.
        fold_feedback = (
            steps is not None
            or class_features.device.type != "cpu"
            or feedback_fold_is_cheaper(rows=classes * (n - 1), width=w_fc.shape[1], hidden=hidden)
        )
        scale, shift = (at_least_fp32(stacked(f"self_attention.layer_norm.{part}")) for part in ("weight", "bias"))
        w_y = stacked("self_attention.fc.weight")
        loop = Loop(
            start=affine(cast(class_features).expand(count, -1, -1), w_ih, cast_stacked("gru.bias_ih")),
            feedback=w_ih @ w_fc if fold_feedback else w_ih,
            feedback_bias=cast(b_ih + _times(w_ih, cast(b_fc)) if fold_feedback else b_ih),
            fc=None if fold_feedback else w_fc,
            fc_bias=None if fold_feedback else cast(b_fc),
            recurrent=cast(turned("gru.weight_hh")),
            recurrent_bias=cast(turned("gru.bias_hh")),
            qkv=cast_stacked("self_attention.self_attention.in_proj_weight"),
            qkv_bias=cast_stacked("self_attention.self_attention.in_proj_bias"),
            out=cast_stacked("self_attention.self_attention.out_proj.weight"),
            out_bias=at_least_fp32(stacked("self_attention.self_attention.out_proj.bias")),
            # The first LayerNorm is read by fc only: its scale and shift move into fc.
            y=cast(w_y * scale[:, None].to(w_y.dtype)),
            y_bias=_times(at_least_fp32(w_y), shift) + stacked("self_attention.fc.bias"),
            scale=scale,
            shift=shift,
            query=query,
            query_bias=query_bias,
            value=value,
            keys=memory[0],
            values=memory[1],
        )
        recording = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in loop)
        steps = steps or Steps(_forward, _backward)
        outputs = _Run.apply(steps, n, heads, *loop) if recording else steps.forward(loop, n, heads, False)[0]
        outputs = outputs.transpose(1, 2).contiguous()  # (G,C,n,H or D)
        if fold_feedback:
            outputs = affine(outputs.flatten(1, 2), w_fc, cast(b_fc)).unflatten(1, (classes, n))
        return outputs


def cross_fold_is_cheaper(*, images: int, rows: int, hidden: int, heads: int) -> bool:
    """Whether cross-attention takes fewer FLOPs with its projections folded into B keys and values; `rows` is C·n."""
    # A row meets heads·B columns twice instead of H + B twice; folding is heads·B·H/heads products, twice. All × 3 with
    # backward: B·(heads − 1 + H/(C·n)) ≤ H.
    return images * (rows * (heads - 1) + hidden) <= rows * hidden


def feedback_fold_is_cheaper(*, rows: int, width: int, hidden: int) -> bool:
    """Whether the feedback takes fewer FLOPs with W_ih·W_fc as one matrix, its product included; `rows` is C·(n−1)."""
    # 3H·H a row instead of 3H·D, and 3H·D·H for the product; o itself is H·D a row either way. All × 3 with backward.
    return rows * (width - hidden) >= hidden * width


class Loop(NamedTuple):
    """What the steps read. Gates are u = W_hn·h + b_hn, r, z, n.

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


class Kept(NamedTuple):
    """What backward needs of every step, (G,n,C,…)."""

    gates: Tensor  # u, r, z, n
    qkv: Tensor
    first: Tensor  # what the first LayerNorm reads
    second: Tensor
    rows: Tensor  # h·queryᵀ + query_bias
    summed: Tensor  # h and what it attended to in the images


class Known(NamedTuple):
    """What backward recomputes for all steps at once, in the dtype of the state."""

    h: Tensor  # (G,n+1,C,H) h_0…h_n
    normal_1: Tensor  # (G,n,C,H) the first LayerNorm, without scale and shift
    mean_1: Tensor  # (n,G,C,1) contiguous, as are the next three
    rstd_1: Tensor
    normal_2: Tensor
    mean_2: Tensor
    rstd_2: Tensor
    weights: Tensor  # (G,n,C,M) what `value` multiplies


class Flow(NamedTuple):
    """Gradients of what every step computes, (G,n,C,…), and what else the gradients of the weights need."""

    outputs: Tensor
    gates: Tensor  # before their nonlinearities
    qkv: Tensor
    first: Tensor
    second: Tensor
    rows: Tensor
    summed: Tensor
    h: Tensor  # of h_1…h_n, in the dtype of the state
    memory: tuple[Tensor | None, Tensor | None]  # of `keys` and `values`
    attended: Tensor  # no gradient: what self-attention returned


class Steps(NamedTuple):
    """The n steps forward and backward, the two of `_forward` and `_backward`."""

    forward: Callable[[Loop, int, int, bool], tuple[Tensor, Kept | None]]
    backward: Callable[[Loop, Kept, Known, Tensor, int], Flow]


class _Run(torch.autograd.Function):
    """The n steps: `Loop` in, (G,n,C,F) out: o_i, or what `fc` makes o_i of where that is folded."""

    @staticmethod
    def forward(ctx: Any, steps: Steps, n: int, heads: int, *tensors: Tensor) -> Tensor:
        loop = Loop(*tensors)
        with no_autocast(loop.start):
            outputs, kept = steps.forward(loop, n, heads, True)
        assert kept is not None
        ctx.save_for_backward(outputs, *kept, *loop)
        ctx.steps, ctx.heads = steps, heads
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        outputs, *rest = ctx.saved_tensors
        size = len(Kept._fields)
        kept, loop, wanted = Kept(*rest[:size]), Loop(*rest[size:]), Loop(*ctx.needs_input_grad[3:])
        with no_autocast(gradient):
            known = recompute(loop, kept, ctx.heads)
            flow = ctx.steps.backward(loop, kept, known, gradient, ctx.heads)
            gradients = _weight_gradients(loop, kept, known, flow, wanted, outputs)
        return None, None, None, *gradients


def empty_outputs(loop: Loop, n: int) -> Tensor:
    return loop.start.new_empty(*_sizes(loop, n), loop.feedback.shape[-1])


def empty_kept(loop: Loop, n: int, outputs: Tensor) -> Kept:
    """Of n steps; `summed` is `outputs` where these are not what `fc` returned."""
    hidden, state = loop.out.shape[-1], loop.scale.dtype

    def buffer(width: int, dtype: torch.dtype = loop.start.dtype) -> Tensor:
        return loop.start.new_empty(*_sizes(loop, n), width, dtype=dtype)

    return Kept(
        gates=buffer(4 * hidden, state),
        qkv=buffer(3 * hidden),
        first=buffer(hidden, state),
        second=buffer(hidden, state),
        rows=buffer(loop.query.shape[1]),
        summed=outputs if loop.fc is None else buffer(hidden),
    )


def recompute(loop: Loop, kept: Kept, heads: int) -> Known:
    n, hidden = kept.first.shape[1], kept.first.shape[-1]
    normal_1, *statistics_1 = torch.native_layer_norm(kept.first, (hidden,), None, None, EPS)
    normal_2, *statistics_2 = torch.native_layer_norm(kept.second, (hidden,), None, None, EPS)
    # Step first: on a CPU the backward of LayerNorm reads its statistics as if they were contiguous.
    mean_1, rstd_1, mean_2, rstd_2 = (part.transpose(0, 1).contiguous() for part in (*statistics_1, *statistics_2))
    h = normal_2.new_empty(*_sizes(loop, n + 1), hidden)
    h[:, 0] = 0
    torch.addcmul(loop.shift[:, None, None], normal_2, loop.scale[:, None, None], out=h[:, 1:])
    weights = _mix(loop, kept.rows.flatten(1, 2), heads).unflatten(1, kept.rows.shape[1:3])
    return Known(h, normal_1, mean_1, rstd_1, normal_2, mean_2, rstd_2, weights)


def _sizes(loop: Loop, n: int) -> tuple[int, int, int]:
    return loop.start.shape[0], n, loop.start.shape[1]


def _forward(loop: Loop, n: int, heads: int, keep: bool) -> tuple[Tensor, Kept | None]:
    """Outputs (G,n,C,F), and what every step leaves for backward."""
    (count, classes, _), hidden = loop.start.shape, loop.out.shape[-1]
    dtype, state = loop.start.dtype, loop.scale.dtype
    outputs = empty_outputs(loop, n)
    kept = empty_kept(loop, n, outputs) if keep else None
    x, u = loop.start, loop.recurrent_bias[:, None].expand(-1, classes, -1)  # h_0 = 0
    h = loop.start.new_zeros(count, classes, hidden, dtype=state)
    for i in range(n):
        gates = _gates(x, u, loop.start.new_empty(count, classes, 4 * hidden, dtype=state))
        h = torch.lerp(gates[..., 3 * hidden :], h, gates[..., 2 * hidden : 3 * hidden])
        qkv = affine(h.to(dtype), loop.qkv, loop.qkv_bias)
        first = _accumulate(h + loop.out_bias[:, None], _attend(qkv, heads), loop.out.mT)
        normal = F.layer_norm(first, (hidden,)).to(dtype)
        second = _accumulate(h + loop.y_bias[:, None], normal, loop.y.mT)
        h = torch.addcmul(loop.shift[:, None], F.layer_norm(second, (hidden,)), loop.scale[:, None])
        query = h.to(dtype)
        rows = affine(query, loop.query, loop.query_bias)
        summed = torch.baddbmm(query, _mix(loop, rows, heads).to(dtype), loop.value)
        output = summed if loop.fc is None or loop.fc_bias is None else affine(summed, loop.fc, loop.fc_bias)
        outputs[:, i] = output
        if kept is not None:  # products write whole tensors, which is faster than writing into a step's place
            for buffers, part in zip(kept, (gates, qkv, first, second, rows, summed), strict=True):
                if buffers is not outputs:
                    buffers[:, i] = part
        if i + 1 < n:
            x = affine(output, loop.feedback, loop.feedback_bias)
            u = affine(query, loop.recurrent, loop.recurrent_bias)
    return outputs, kept


def _backward(loop: Loop, kept: Kept, known: Known, gradient: Tensor, heads: int) -> Flow:
    """Back over the steps: what each needs of the one after."""
    count, n = kept.summed.shape[:2]
    hidden, dtype, state = kept.first.shape[-1], kept.qkv.dtype, loop.scale.dtype
    z = kept.gates[..., 2 * hidden : 3 * hidden]
    factors = _gate_factors(kept.gates, known.h[:, :-1])
    weights, mean_2, rstd_2 = known.weights, known.mean_2, known.rstd_2
    d_outputs = torch.empty_like(gradient, memory_format=torch.contiguous_format)
    d_summed = d_outputs if loop.fc is None else torch.empty_like(kept.summed)
    d_gates = factors if state == dtype else torch.empty_like(factors, dtype=dtype)
    d_qkv, d_first, d_second, d_rows = (torch.empty_like(part, dtype=dtype) for part in kept[1:5])
    d_h = torch.empty_like(kept.second)
    memory = None if loop.keys is None or loop.values is None else (loop.keys, loop.values)
    d_memory = [] if memory is None else [torch.zeros_like(part, dtype=state) for part in memory]
    d_state = torch.zeros_like(kept.second[:, 0])
    d_output = gradient[:, -1]
    for i in reversed(range(n)):
        d_outputs[:, i] = d_output
        d_sum = d_output if loop.fc is None else torch.bmm(d_output, loop.fc)
        if loop.fc is not None:
            d_summed[:, i] = d_sum
        d_mixed = torch.bmm(d_sum, loop.value.mT)
        if memory is None:
            d_scores = d_mixed.to(state).unflatten(-1, (heads, -1))
            d_rows[:, i] = _softmax_backward(d_scores, weights[:, i].unflatten(-1, (heads, -1))).flatten(2)
        else:
            d_mixed, query = (_heads_first(part, 1, heads)[0] for part in (d_mixed, kept.rows[:, i]))
            keys, values = (part.flatten(0, 1) for part in memory)
            d_query, *parts = _attention_backward(d_mixed, query, keys, values, 1.0)
            d_rows[:, i] = merge(d_query.unflatten(0, (count, heads)))
            for target, part in zip(d_memory, parts, strict=True):
                target += part.view_as(target)
        d_state = _accumulate(d_state.add_(d_sum), d_rows[:, i], loop.query)
        d_h[:, i] = d_state

        # Both LayerNorms and attention between the classes.
        d_inner = _layer_norm_backward(d_state * loop.scale[:, None], kept.second[:, i], mean_2[i], rstd_2[i])
        d_second[:, i] = d_inner
        d_normal = torch.bmm(d_second[:, i], loop.y).to(state)
        d_residual = _layer_norm_backward(d_normal, kept.first[:, i], known.mean_1[i], known.rstd_1[i])
        d_first[:, i] = d_residual
        d_inner.add_(d_residual)
        (d_attended,) = _heads_first(torch.bmm(d_first[:, i], loop.out), 1, heads)
        q, k, v = _heads_first(kept.qkv[:, i], 3, heads)
        parts = list(_attention_backward(d_attended, q, k, v, q.shape[-1] ** -0.5))
        for target, part in zip(d_qkv[:, i].chunk(3, dim=-1), parts, strict=True):
            target.unflatten(-1, (heads, -1)).copy_(part.unflatten(0, (count, heads)).transpose(1, 2))
        _accumulate(d_inner, d_qkv[:, i], loop.qkv)

        # GRU cell, and on to the step before.
        four = (-1, (4, hidden))
        torch.mul(factors[:, i].unflatten(*four), d_inner[:, :, None], out=d_gates[:, i].unflatten(*four))
        if i > 0:
            d_state = _accumulate(d_inner * z[:, i], d_gates[:, i, :, : 3 * hidden], loop.recurrent)
            d_output = torch.baddbmm(gradient[:, i - 1], d_gates[:, i, :, hidden:], loop.feedback)

    attended = _attend(kept.qkv.flatten(0, 1), heads).unflatten(0, (count, n))
    d_keys, d_values = [part.to(dtype) for part in d_memory] or (None, None)
    return Flow(d_outputs, d_gates, d_qkv, d_first, d_second, d_rows, d_summed, d_h, (d_keys, d_values), attended)


def _weight_gradients(
    loop: Loop, kept: Kept, known: Known, flow: Flow, wanted: Loop, outputs: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of `loop`, in its order, over the rows of all steps; of the weights those `wanted`."""
    hidden, dtype = kept.first.shape[-1], outputs.dtype
    z, candidate = kept.gates.chunk(4, dim=-1)[2:]

    def product(left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(left.flatten(1, 2).mT, right.flatten(1, 2))

    def total(part: Tensor, like: Tensor) -> Tensor:
        return part.sum((1, 2), dtype=like.dtype)

    inner = torch.lerp(candidate, known.h[:, :-1], z).to(dtype)  # what the GRU cell returned
    h = known.h.to(dtype)
    d_u, d_x = flow.gates[..., : 3 * hidden], flow.gates[..., hidden:]
    gradients: dict[str, Tensor | None] = {
        "start": d_x[:, 0],
        "feedback": product(d_x[:, 1:], outputs[:, :-1]) if wanted.feedback else None,
        "feedback_bias": total(d_x[:, 1:], loop.feedback_bias),
        "fc": product(flow.outputs, kept.summed) if wanted.fc else None,
        "fc_bias": None if loop.fc_bias is None else total(flow.outputs, loop.fc_bias),
        "recurrent": product(d_u[:, 1:], h[:, 1:-1]) if wanted.recurrent else None,
        "recurrent_bias": total(d_u, loop.recurrent_bias),
        "qkv": product(flow.qkv, inner) if wanted.qkv else None,
        "qkv_bias": total(flow.qkv, loop.qkv_bias),
        "out": product(flow.first, flow.attended) if wanted.out else None,
        "out_bias": total(flow.first, loop.out_bias),
        "y": product(flow.second, known.normal_1.to(dtype)) if wanted.y else None,
        "y_bias": total(flow.second, loop.y_bias),
        "scale": total(known.normal_2.mul_(flow.h), loop.scale),
        "shift": total(flow.h, loop.shift),
        "query": product(flow.rows, h[:, 1:]) if wanted.query else None,
        "query_bias": total(flow.rows, loop.query_bias),
        "value": product(known.weights.to(dtype), flow.summed) if wanted.value else None,
        "keys": flow.memory[0],
        "values": flow.memory[1],
    }
    return tuple(gradients[name] for name in Loop._fields)


def _gates(x: Tensor, u: Tensor, gates: Tensor) -> Tensor:
    """u, r, z, n of a step in `gates` (G,C,4H), from x = W_ih·x + b_ih and u = W_hh·h + b_hh."""
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


def _attend(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention of (A,C,3H), (A,C,H), before its output projection."""
    q, k, v = (split(part, heads) for part in qkv.chunk(3, dim=-1))
    return merge(F.scaled_dot_product_attention(q, k, v))


def _mix(loop: Loop, rows: Tensor, heads: int) -> Tensor:
    """What `value` multiplies, (G,R,M): softmax over the images, or the values it mixes where they are not folded."""
    if loop.keys is None or loop.values is None:
        return torch.softmax(rows.unflatten(-1, (heads, -1)), dim=-1, dtype=loop.scale.dtype).flatten(2)
    return merge(F.scaled_dot_product_attention(split(rows, heads), loop.keys, loop.values, scale=1.0))


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
    """into += x·weight, also where the product is of a shorter type."""
    return into.baddbmm_(x, weight) if into.dtype == x.dtype else into.add_(torch.bmm(x, weight))


def _times(weight: Tensor, vector: Tensor) -> Tensor:
    """weight (G,O,I) · vector (G,I)."""
    return (weight @ vector[..., None])[..., 0]


def _heads_first(rows: Tensor, parts: int, heads: int) -> Tensor:
    """(G,R,parts·H) as (parts,G·heads,R,H/heads), one copy."""
    return rows.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)

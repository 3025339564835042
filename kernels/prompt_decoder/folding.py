"""Fold a GRU decoder's layers into the weights that its n steps read; exact in real arithmetic.

Keys and values of the images are projected once, not at every step, and where that is cheaper the projections around
them are folded into them. The input of step i+1 is affine in what step i passes to `fc`, so W_ih·W_fc is one matrix and
the outputs themselves are one product after the loop. MATH.md, section "Prompt decoder", has the derivations. Every
implementation of the steps starts here: torch operators in `eager.py`, kernels in `triton/`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..precision import at_least_fp32, compute_dtype, no_autocast
from .inputs import Decoder, Inputs
from .recurrence import StepImplementation, StepWeights, run_steps
from .stacked import Stacked, affine, split

_CAST = (
    *("gru.weight_ih", "gru.bias_ih", "gru.weight_hh", "gru.bias_hh", "encoder_proj.weight", "encoder_proj.bias"),
    *("fc.weight", "encoder_attention.in_proj_weight", "encoder_attention.in_proj_bias"),
    *("encoder_attention.out_proj.weight", "self_attention.self_attention.in_proj_weight"),
    *("self_attention.self_attention.in_proj_bias", "self_attention.self_attention.out_proj.weight"),
)
"""parameters that are read in the dtype of the products"""
_RAW = (
    *("gru.bias_ih", "fc.bias", "encoder_attention.out_proj.bias", "self_attention.self_attention.out_proj.bias"),
    *("self_attention.layer_norm.weight", "self_attention.layer_norm.bias"),
    *("self_attention.fc.weight", "self_attention.fc.bias"),
)
"""parameters that are read in their own"""


def decode(inputs: Inputs, implementation: StepImplementation) -> Tensor:
    """Outputs o_1…o_n of G decoders, as `op.decode`, the steps by `implementation`.

    Under autocast products run in autocast's dtype, which is also the result's; the state, gates, LayerNorm and softmax
    stay in float32. The result can be differentiated once.
    """
    class_features, context, present = inputs.class_features, inputs.context, inputs.present
    decoders, prompt_length, heads = inputs.decoders, inputs.prompt_length, inputs.heads
    dtype = compute_dtype(class_features)
    classes, width = class_features.shape
    hidden = decoders[0]["encoder_proj.weight"].shape[0]
    # Folded, an image's score has a bias of its own, which can leave it out.
    cross = (
        implementation.folded_only
        or present is not None
        or cross_fold_is_cheaper(images=len(context), rows=classes * prompt_length, hidden=hidden, heads=heads)
    )
    # Anywhere but on a CPU steps wait for one another, not for FLOPs.
    feedback = (
        implementation.folded_only
        or class_features.device.type != "cpu"
        or feedback_fold_is_cheaper(rows=classes * (prompt_length - 1), width=width, hidden=hidden)
    )
    with no_autocast(class_features):
        weights, fc = _fold(decoders, class_features.to(dtype), context.to(dtype), heads, cross, feedback)
        if present is not None:
            absent = ~present.repeat(heads)
            weights = weights._replace(query_bias=weights.query_bias.masked_fill(absent, -torch.inf))
        outputs = run_steps(implementation, prompt_length, heads, weights)
        outputs = outputs.transpose(1, 2).contiguous()  # (G,C,n,H or D)
        return affine(outputs.flatten(1, 2), *fc).unflatten(1, (classes, prompt_length)) if fc else outputs


def cross_fold_is_cheaper(*, images: int, rows: int, hidden: int, heads: int) -> bool:
    """Tell if cross-attention takes fewer FLOPs with its projections folded into B keys and values; `rows` is C·n."""
    # A row meets heads·B columns twice instead of H + B twice; folding is heads·B·H/heads products, twice. All × 3 with
    # backward: B·(heads − 1 + H/(C·n)) ≤ H.
    return images * (rows * (heads - 1) + hidden) <= rows * hidden


def feedback_fold_is_cheaper(*, rows: int, width: int, hidden: int) -> bool:
    """Tell if the feedback takes fewer FLOPs with W_ih·W_fc as one matrix, its product included; `rows` is C·(n−1)."""
    # 3H·H a row instead of 3H·D, and 3H·D·H for the product; o itself is H·D a row either way. All × 3 with backward.
    return rows * (width - hidden) >= hidden * width


def _fold(
    decoders: Sequence[Decoder], class_features: Tensor, context: Tensor, heads: int, cross: bool, feedback: bool
) -> tuple[StepWeights, tuple[Tensor, Tensor] | None]:
    """Weights of the steps, and weight and bias of `fc` where it is left for after the loop.

    Args:
        class_features, context: in the dtype of the products.
        cross: fold the projections of cross-attention.
        feedback: fold `fc` into the input of the next step.
    """
    count, dtype = len(decoders), class_features.dtype
    p = Stacked(decoders, dtype, cast=_CAST, raw=_RAW)
    w_ih, w_fc, b_ih = p["gru.weight_ih"], p["fc.weight"], p.raw("gru.bias_ih")
    hidden = b_ih.shape[-1] // 3
    w_cross, b_cross = p["encoder_attention.in_proj_weight"], p["encoder_attention.in_proj_bias"]
    w_o, b_o = p["encoder_attention.out_proj.weight"], p.raw("encoder_attention.out_proj.bias")
    # h + attended + b_o goes through fc only: b_o moves into the bias of fc.
    b_fc = _times(w_fc, b_o.to(dtype)) + p.raw("fc.bias")

    c = p.linear("encoder_proj", context.expand(count, -1, -1))  # (G,B,H)
    (query, w_memory), (query_bias, b_memory) = (part.split([hidden, 2 * hidden], 1) for part in (w_cross, b_cross))
    keys, values = (split(part, heads) for part in affine(c, w_memory, b_memory).chunk(2, dim=-1))
    keys, value = keys * keys.shape[-1] ** -0.5, w_o.mT
    memory: tuple[Tensor | None, Tensor | None] = (None, None)
    if cross:
        query, query_bias = (
            (keys @ part).flatten(1, 2)
            for part in (query.unflatten(1, (heads, -1)), query_bias.unflatten(1, (heads, -1, 1)))
        )
        query_bias, value = query_bias.squeeze(-1), (values @ value.unflatten(1, (heads, -1))).flatten(1, 2)
    else:
        memory = keys.contiguous(), values.contiguous()

    scale, shift = (at_least_fp32(p.raw(f"self_attention.layer_norm.{part}")) for part in ("weight", "bias"))
    w_y = p.raw("self_attention.fc.weight")
    weights = StepWeights(
        start=affine(class_features.expand(count, -1, -1), w_ih, p["gru.bias_ih"]),
        feedback=w_ih @ w_fc if feedback else w_ih,
        feedback_bias=(b_ih + _times(w_ih, b_fc.to(dtype)) if feedback else b_ih).to(dtype),
        fc=None if feedback else w_fc,
        fc_bias=None if feedback else b_fc.to(dtype),
        # Rows r, z, n as n, r, z: the gates u, r, z, n are one block that W_hh (u, r, z) and W_ih (r, z, n) overlap in.
        recurrent=p["gru.weight_hh"].roll(hidden, dims=1),
        recurrent_bias=p["gru.bias_hh"].roll(hidden, dims=1),
        qkv=p["self_attention.self_attention.in_proj_weight"],
        qkv_bias=p["self_attention.self_attention.in_proj_bias"],
        out=p["self_attention.self_attention.out_proj.weight"],
        out_bias=at_least_fp32(p.raw("self_attention.self_attention.out_proj.bias")),
        # The first LayerNorm is read by fc only: its scale and shift move into fc.
        y=(w_y * scale[:, None].to(w_y.dtype)).to(dtype),
        y_bias=_times(at_least_fp32(w_y), shift) + p.raw("self_attention.fc.bias"),
        scale=scale,
        shift=shift,
        query=query,
        query_bias=query_bias,
        value=value,
        keys=memory[0],
        values=memory[1],
    )
    return weights, (w_fc, b_fc.to(dtype)) if feedback else None


def _times(weight: Tensor, vector: Tensor) -> Tensor:
    """weight (G,O,I) · vector (G,I)."""
    return (weight @ vector[..., None]).squeeze(-1)  # whose backward is a view, where `[..., 0]` writes zeros

"""The prompt decoder around an LSTM cell, as the published code has it: it differs from the GRU's in its context, too.

Each image queries the classes, and what the images gather, averaged, is one context for every class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import at_least_fp32, compute_dtype, no_autocast
from .inputs import Decoder, Inputs
from .kind import DecoderKind
from .reference import attention, linear, self_attention
from .stacked import Stacked, affine, split


def reference(inputs: Inputs) -> Tensor:
    """Outputs o_1…o_n of each of G decoders, literally, as `op.decode`."""
    return torch.stack([_reference(p, inputs) for p in inputs.decoders])


def _reference(p: Decoder, inputs: Inputs) -> Tensor:
    heads = inputs.heads
    x = inputs.class_features  # x_0 = t_0, (C,D)
    images = linear(p, "encoder_proj", inputs.images)  # (B,H)
    h = cell = x.new_zeros(len(x), images.shape[-1])  # (C,H)
    outputs = []
    for _ in range(inputs.prompt_length):
        h, cell = _cell(p, x, h, cell)
        h = self_attention(p, h, heads)
        seen = attention(p, "encoder_attention", images, h, heads).mean(dim=0)  # (H,)
        x = linear(p, "fc", h + seen)  # o_i is the next step's input
        outputs.append(x)
    return torch.stack(outputs, dim=1)


def _cell(p: Decoder, x: Tensor, h: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden and cell state after one step of an LSTM; gates in the order i, f, g, o."""
    gates = F.linear(x, p["lstm.weight_ih"], p["lstm.bias_ih"]) + F.linear(h, p["lstm.weight_hh"], p["lstm.bias_hh"])
    return _gated(gates, cell)


def _gated(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = gates.chunk(4, dim=-1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def eager(inputs: Inputs) -> Tensor:
    """The same, all decoders at once, without repeated work; exact in real arithmetic.

    The images' queries are projected once for all steps. The mean over images is taken of the attention weights, so
    that one row a decoder, not one an image, goes through the value and output projections. Under autocast products
    run in autocast's dtype, which is also the result's; the state, LayerNorm and softmax stay in float32.
    """
    class_features, heads = inputs.class_features, inputs.heads
    dtype = compute_dtype(class_features)
    with no_autocast(class_features):
        p, count, norm = Stacked(inputs.decoders, dtype), len(inputs.decoders), "self_attention.layer_norm"
        # Both biases of the cell are added to the same sum.
        bias = p["lstm.bias_ih"] + p["lstm.bias_hh"]
        w_q, w_k, w_v = p["encoder_attention.in_proj_weight"].chunk(3, dim=1)
        b_q, b_k, b_v = p["encoder_attention.in_proj_bias"].chunk(3, dim=1)
        w_v, b_v = (
            w_v.unflatten(1, (heads, -1)),
            b_v.unflatten(1, (heads, -1)),
        )  # (G,heads,H/heads,H), (G,heads,H/heads)

        images = p.linear("encoder_proj", inputs.context.to(dtype).expand(count, -1, -1))
        query = split(affine(images, w_q, b_q), heads)  # (G,heads,B,H/heads)
        query = query * query.shape[-1] ** -0.5
        x = class_features.to(dtype).expand(count, -1, -1)  # (G,C,D)
        h = cell = at_least_fp32(x.new_zeros(*x.shape[:2], images.shape[-1]))
        outputs = []
        for _ in range(inputs.prompt_length):
            gates = torch.baddbmm(affine(x, p["lstm.weight_ih"], bias), h.to(dtype), p["lstm.weight_hh"].mT)
            h, cell = _gated(at_least_fp32(gates), cell)
            y = p.layer_norm(norm, h + p.self_attention("self_attention.self_attention", h.to(dtype), heads))
            h = p.layer_norm(norm, p.linear("self_attention.fc", y.to(dtype)) + h)
            keys = split(affine(h.to(dtype), w_k, b_k), heads)
            weights = _mean(torch.softmax(at_least_fp32(query @ keys.mT), dim=-1), inputs.present)  # (G,heads,C)
            mixed = (weights @ h).to(dtype)  # (G,heads,H); the weights sum to 1, so b_v passes unchanged
            values = (w_v @ mixed[..., None]).squeeze(-1) + b_v
            seen = p.linear("encoder_attention.out_proj", values.flatten(1)[:, None])  # (G,1,H)
            x = p.linear("fc", (h + seen).to(dtype))
            outputs.append(x)
        return torch.stack(outputs, dim=2)


def _mean(weights: Tensor, present: Tensor | None) -> Tensor:
    """Mean (G,heads,C) over the images that count, of weights (G,heads,B,C)."""
    if present is None:
        return weights.mean(dim=2)
    return (weights * present[:, None]).sum(dim=2) / present.sum()


KIND = DecoderKind(
    name="lstm",
    implementations={"eager": eager, "reference": reference},
    first_weight="encoder_proj.weight",
)

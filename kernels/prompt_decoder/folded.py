"""The prompt decoder without repeated work, all decoders at once; exact in real arithmetic.

Keys and values of the images are projected once, not at every step. The input of step i+1 is affine in what step i
passes to `fc`, so W_ih·W_fc is one matrix, and the outputs themselves are one product after the loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import Decoder


def decode(
    decoders: Sequence[Decoder], class_features: Tensor, context: Tensor, *, prompt_length: int, heads: int
) -> Tensor:
    """Outputs o_1…o_n of G decoders; arguments and result as `op.decode`. Shapes below: G decoders, C classes."""
    count, classes = len(decoders), len(class_features)

    def stacked(name: str) -> Tensor:
        return torch.stack([decoder[name] for decoder in decoders])

    def affine(name: str, x: Tensor) -> Tensor:
        return _affine(x, stacked(f"{name}.weight"), stacked(f"{name}.bias"))

    w_ih, b_ih = stacked("gru.weight_ih"), stacked("gru.bias_ih")
    w_hh, b_hh = stacked("gru.weight_hh"), stacked("gru.bias_hh")
    w_fc, b_fc = stacked("fc.weight"), stacked("fc.bias")
    w_qkv, b_qkv = (stacked(f"self_attention.self_attention.in_proj_{part}") for part in ("weight", "bias"))
    w_out, b_out = (stacked(f"self_attention.self_attention.out_proj.{part}") for part in ("weight", "bias"))
    w_y, b_y = stacked("self_attention.fc.weight"), stacked("self_attention.fc.bias")
    scale, shift = (stacked(f"self_attention.layer_norm.{part}")[:, None] for part in ("weight", "bias"))
    w_cross, b_cross = (stacked(f"encoder_attention.in_proj_{part}") for part in ("weight", "bias"))
    w_o, b_o = (stacked(f"encoder_attention.out_proj.{part}") for part in ("weight", "bias"))
    hidden = w_hh.shape[-1]

    c = affine("encoder_proj", context.expand(count, -1, -1))  # (G,B,H)
    keys, values = (
        _split(part, heads) for part in _affine(c, w_cross[:, hidden:], b_cross[:, hidden:]).chunk(2, dim=-1)
    )
    w_q, b_q = w_cross[:, :hidden], b_cross[:, :hidden]
    w_feedback, b_feedback = w_ih @ w_fc, (w_ih @ b_fc[..., None])[..., 0] + b_ih

    def layer_norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * scale + shift

    gates = _affine(class_features.expand(count, -1, -1), w_ih, b_ih)  # W_ih·x_0 + b_ih, (G,C,3H)
    h = gates.new_zeros(count, classes, hidden)
    collected = []
    for _ in range(prompt_length):
        x_rz, x_n = gates.split([2 * hidden, hidden], dim=-1)
        h_rz, h_n = _affine(h, w_hh, b_hh).split([2 * hidden, hidden], dim=-1)
        r, z = torch.sigmoid(x_rz + h_rz).chunk(2, dim=-1)
        candidate = torch.tanh(x_n + r * h_n)
        h = candidate + z * (h - candidate)
        q, k, v = (_split(part, heads) for part in _affine(h, w_qkv, b_qkv).chunk(3, dim=-1))
        y = layer_norm(h + _affine(_merge(F.scaled_dot_product_attention(q, k, v)), w_out, b_out))
        h = layer_norm(_affine(y, w_y, b_y) + h)
        attended = F.scaled_dot_product_attention(_split(_affine(h, w_q, b_q), heads), keys, values)
        collected.append(h + _affine(_merge(attended), w_o, b_o))
        gates = _affine(collected[-1], w_feedback, b_feedback)
    outputs = torch.stack(collected, dim=2)  # (G,C,n,H)
    return _affine(outputs.flatten(1, 2), w_fc, b_fc).unflatten(1, (classes, prompt_length))


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (G,R,I) · weightᵀ (G,O,I) + bias (G,O), one product a decoder."""
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


def _split(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)  # (G, heads, rows, H/heads)


def _merge(attended: Tensor) -> Tensor:
    return attended.transpose(1, 2).flatten(2)

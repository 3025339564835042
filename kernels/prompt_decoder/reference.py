"""The GRU prompt decoder, step by step (paper 3.2, eqs. 3 and 4), and the attention that the other kinds share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Decoder, Inputs


def decode(inputs: Inputs) -> Tensor:
    """Outputs o_1…o_n of each of G decoders, as `op.decode`."""
    return torch.stack([_decode(p, inputs) for p in inputs.decoders])


def _decode(p: Decoder, inputs: Inputs) -> Tensor:
    heads = inputs.heads
    c = linear(p, "encoder_proj", inputs.images)  # (B,H), the same keys and values for every class
    x = inputs.class_features  # x_0 = t_0, (C,D)
    h = x.new_zeros(len(x), c.shape[-1])  # h_0, (C,H)
    outputs = []
    for _ in range(inputs.prompt_length):
        h = _gru_cell(p, x, h)
        h = self_attention(p, h, heads)
        x = linear(p, "fc", h + attention(p, "encoder_attention", h, c, heads))  # o_i is the next step's input
        outputs.append(x)
    return torch.stack(outputs, dim=1)


def _gru_cell(p: Decoder, x: Tensor, h: Tensor) -> Tensor:
    """h' = (1 − z)⊙ñ + z⊙h, gates in the order r, z, n."""
    x_r, x_z, x_n = F.linear(x, p["gru.weight_ih"], p["gru.bias_ih"]).chunk(3, dim=-1)
    h_r, h_z, h_n = F.linear(h, p["gru.weight_hh"], p["gru.bias_hh"]).chunk(3, dim=-1)
    r = torch.sigmoid(x_r + h_r)
    z = torch.sigmoid(x_z + h_z)
    candidate = torch.tanh(x_n + r * h_n)
    return (1 - z) * candidate + z * h


def self_attention(p: Decoder, h: Tensor, heads: int) -> Tensor:
    """Attention across the C classes and a linear layer, each with a residual; one LayerNorm serves both."""
    norm = "self_attention.layer_norm"
    y = layer_norm(p, norm, h + attention(p, "self_attention.self_attention", h, h, heads))
    return layer_norm(p, norm, linear(p, "self_attention.fc", y) + h)


def attention(p: Decoder, name: str, query: Tensor, memory: Tensor, heads: int) -> Tensor:
    """Multi-head attention of query (Q,H) to memory (K,H), which is key and value at once; returns (Q,H)."""
    w_q, w_k, w_v = p[f"{name}.in_proj_weight"].chunk(3)
    b_q, b_k, b_v = p[f"{name}.in_proj_bias"].chunk(3)

    def split(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (heads, -1)).transpose(0, 1)  # (heads, rows, H/heads)

    q, k, v = split(F.linear(query, w_q, b_q)), split(F.linear(memory, w_k, b_k)), split(F.linear(memory, w_v, b_v))
    weights = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1)
    return linear(p, f"{name}.out_proj", (weights @ v).transpose(0, 1).flatten(1))


def layer_norm(p: Decoder, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])


def linear(p: Decoder, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

"""The Transformer prompt decoder (paper, table 3): what its blocks return is the next step's input, n times.

A block has no memory but that input: its attention runs across the classes, not across the steps, so there is no
causal mask and no earlier step to cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import at_least_fp32, compute_dtype, no_autocast
from .inputs import Decoder, Inputs
from .kind import DecoderKind
from .reference import attention, layer_norm, linear
from .stacked import Stacked, affine, split


def blocks(decoder: Decoder) -> int:
    """Number of blocks in a decoder's parameters."""
    return sum(name.startswith("resblocks.") and name.endswith(".ln_1.weight") for name in decoder)


def reference(inputs: Inputs) -> Tensor:
    """Outputs x_1…x_n of each of G decoders, literally, as `op.decode`."""
    every = [None] * len(inputs.decoders) if inputs.branches is None else list(inputs.branches)
    return torch.stack([_reference(p, inputs, own) for p, own in zip(inputs.decoders, every, strict=True)])


def _reference(p: Decoder, inputs: Inputs, factors: Tensor | None) -> Tensor:
    heads = inputs.heads
    c = linear(p, "encoder_proj", inputs.images)  # (B,H), the same keys and values for every class
    x = linear(p, "input_proj", inputs.class_features)  # (C,H)
    if factors is None:
        factors = x.new_ones(inputs.prompt_length, blocks(p), 3, len(x))
    outputs = []
    for step in factors[..., None]:
        for number, (own, crossed, wide) in enumerate(step):
            block = f"resblocks.{number}"
            y = layer_norm(p, f"{block}.ln_1", x)
            x = x + own * attention(p, f"{block}.self_attn", y, y, heads)
            x = x + crossed * attention(p, f"{block}.cross_attn", layer_norm(p, f"{block}.ln_2", x), c, heads)
            y = F.relu(linear(p, f"{block}.mlp.0", layer_norm(p, f"{block}.ln_3", x)))
            x = x + wide * linear(p, f"{block}.mlp.2", y)
        outputs.append(x)
    return torch.stack(outputs, dim=1)


def eager(inputs: Inputs) -> Tensor:
    """The same, all decoders at once, keys and values of the images projected once a block and not at every step.

    Under autocast products run in autocast's dtype, which is also the result's; the residual stream and LayerNorm stay
    in float32.
    """
    class_features, heads, branches = inputs.class_features, inputs.heads, inputs.branches
    dtype = compute_dtype(class_features)
    with no_autocast(class_features):
        p, count = Stacked(inputs.decoders, dtype), len(inputs.decoders)
        c = p.linear("encoder_proj", inputs.context.to(dtype).expand(count, -1, -1))  # (G,B,H)
        depth, hidden = blocks(inputs.decoders[0]), c.shape[-1]
        memory, queries = [], []
        for number in range(depth):
            cross = f"resblocks.{number}.cross_attn"
            (w_q, w_kv), (b_q, b_kv) = (
                p[f"{cross}.in_proj_{part}"].split([hidden, 2 * hidden], dim=1) for part in ("weight", "bias")
            )
            memory.append([split(part, heads) for part in affine(c, w_kv, b_kv).chunk(2, dim=-1)])
            queries.append((w_q, b_q))
        x = at_least_fp32(p.linear("input_proj", class_features.to(dtype).expand(count, -1, -1)))  # (G,C,H)

        def residual(x: Tensor, step: int, block: int, branch: int, y: Tensor) -> Tensor:
            return x + y if branches is None else x + branches[:, step, block, branch, :, None] * y

        outputs = []
        for step in range(inputs.prompt_length):
            for number in range(depth):
                block = f"resblocks.{number}"
                y = p.layer_norm(f"{block}.ln_1", x).to(dtype)
                x = residual(x, step, number, 0, p.self_attention(f"{block}.self_attn", y, heads))
                y = p.layer_norm(f"{block}.ln_2", x).to(dtype)
                (k, v), query = memory[number], split(affine(y, *queries[number]), heads)
                x = residual(x, step, number, 1, p.attend(f"{block}.cross_attn", query, k, v, inputs.present))
                y = F.relu(p.linear(f"{block}.mlp.0", p.layer_norm(f"{block}.ln_3", x).to(dtype)))
                x = residual(x, step, number, 2, p.linear(f"{block}.mlp.2", y))
            outputs.append(x.to(dtype))
        return torch.stack(outputs, dim=2)


KIND = DecoderKind(
    name="transformer",
    implementations={"eager": eager, "reference": reference},
    first_weight="encoder_proj.weight",
    takes_branches=True,
)

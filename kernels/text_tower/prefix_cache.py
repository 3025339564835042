"""Prompts through a frozen text tower without repeating what they share; exact in real arithmetic.

The tower is causal, so the prefix [SOS, V_i, name_i] has the same hidden states whatever follows: the rest of the
single prompt of class i, or the tail [V_j, name_j …] of any pair (i, j). SOS sees only itself: one row for all. In the
first layer a tail has not met its prefix yet: queries, keys and values there depend on j (and its position) alone. In
the last layer only the pooled token is read. MATH.md, section "Text tower", has the derivations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .block_operations import Continuation, Passes
from .blocks import EAGER, after_attention, last_block, project
from .reference import TextTower, layer_norm
from .sequences import Frame

Prefixes = tuple[Tensor, ...]
"""What the tower keeps of N prefixes of S tokens, a tensor a layer: keys and values (N,S,2W), and for the last layer
its input after LayerNorm (N,S,W). S counts SOS, n vectors, and the longest name (shorter ones are padded)."""


class Tails(NamedTuple):
    """J token sequences that can follow a prefix."""

    x: Tensor
    """(J,T,W) input of the first layer, positions included"""
    entry: Tensor
    """(J,T,3W) their queries, keys and values there; in a tower of one layer (J,T,W), after its LayerNorm"""
    pooled: Tensor | None
    """(J,) token that the feature is read from; None: the last"""


def encode_prefixes(tower: TextTower, frame: Frame, prompts: Tensor, passes: Passes = EAGER) -> Prefixes:
    """States of the prefixes [SOS, V_c, name_c].

    Args:
        prompts: (N,n,W); N is a multiple of C, and row r belongs to class r mod C.
        passes: form of what happens between the matrix products.
    """
    names = frame.suffix[:, : frame.longest_name].repeat(len(prompts) // len(frame.lengths), 1, 1)
    tokens = torch.cat([prompts, names], dim=1)
    count, length, width = tokens.shape
    positions = tower.positional_embedding
    # SOS is row 0 of all products, the N·length live tokens come after it: N tails of one prefix, SOS.
    x = torch.cat([(frame.sos + positions[0])[None], (tokens + positions[1 : 1 + length]).flatten(0, 1)])
    rows = torch.arange(count, device=x.device)
    all_of_sos = Continuation(torch.zeros_like(rows), rows, prefixes=1, tails=count, tokens=length, seen=1)

    def with_sos(rows: Tensor) -> Tensor:
        sos, live = rows.split([1, count * length])
        return torch.cat([sos.expand(count, 1, -1), live.unflatten(0, (count, length))], dim=1)

    states, delta = [], None
    for layer in tower.layers[:-1]:
        x, y = passes.add_norm(tower, x, delta, layer.ln_1_weight, layer.ln_1_bias)
        projected = project(layer, y)
        states.append(with_sos(projected[:, width:]))
        # What SOS is, is a constant of the tower.
        sos, live = projected[:1, width:].detach(), projected[1:].unflatten(0, (count, length))
        attended = passes.attend(tower.heads, live, sos[None], all_of_sos)
        attended = torch.cat([sos[:, width:], attended.flatten(0, 1)])
        x, delta = after_attention(tower, passes, layer, x, attended)
    last = tower.layers[-1]
    return *states, with_sos(passes.add_norm(tower, x, delta, last.ln_1_weight, last.ln_1_bias)[1])


def single_tails(tower: TextTower, frame: Frame, prompt_length: int) -> Tails:
    """What follows the prefix in the single prompt of each class: EOS; in prefix mode ".", EOS. C tails."""
    steps = torch.arange(2 if frame.named else 1, device=frame.suffix.device)
    offsets = frame.name_lengths[:, None] + steps  # (C,T) into the suffix
    tokens = frame.suffix.gather(1, offsets[..., None].expand(-1, -1, frame.suffix.shape[-1]))
    return _tails(tower, tokens, 1 + prompt_length + offsets)


def pair_tails(tower: TextTower, frame: Frame, prompts: Tensor) -> Tails:
    """What follows the prefix of i in the pair prompts (i, j): [V_j, EOS]; in prefix mode [V_j, name_j, "."].

    Its positions start after name_i, so there is one tail for each j and each length that a name has: C tails a length,
    shortest first.

    Args:
        prompts: (C,n,W).
    """
    n = prompts.shape[1]
    tokens = torch.cat([prompts, frame.suffix[:, : frame.longest_name + 1]], dim=1)
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    starts = [1 + n + length for length in _distinct(frame)]
    positions = torch.stack([start + steps for start in starts])[:, None].expand(-1, len(tokens), -1)
    tails = _tails(tower, tokens.repeat(len(starts), 1, 1), positions.flatten(0, 1))
    return tails._replace(pooled=(n + frame.name_lengths).repeat(len(starts))) if frame.named else tails


def pair_rows(frame: Frame, first: Tensor, second: Tensor) -> Tensor:
    """(R,) the tails of pairs in what `pair_tails` gives."""
    # Comparisons with host numbers: no index tensor has to be copied to the device.
    groups = sum((frame.name_lengths[first] >= length).long() for length in _distinct(frame)[1:])
    return second + groups * len(frame.lengths)


def encode_tails(
    tower: TextTower,
    prefixes: Prefixes,
    tails: Tails,
    first: Tensor,
    second: Tensor,
    lengths: Tensor | None = None,
    passes: Passes = EAGER,
) -> Tensor:
    """Features of R sequences, each a prefix and a tail.

    Args:
        prefixes: N prefixes.
        tails: J tails.
        first, second: (R,) int64, prefix and tail of each sequence; `first` ascends.
        lengths: (R,) tokens of each prefix that are not padding; None: all.
        passes: form of what happens between the matrix products.

    Returns:
        (R,D), not normalised.
    """
    pairs = Continuation(
        *(first, second),
        prefixes=len(prefixes[0]),
        tails=len(tails.x),
        tokens=tails.x.shape[1],
        seen=prefixes[0].shape[1],
        lengths=lengths,
    )
    x, entry = (passes.of_tail(table, pairs) for table in tails[:2])
    delta = None
    for number, layer in enumerate(tower.layers[:-1]):
        if number == 0:
            projected = entry
        else:
            x, y = passes.add_norm(tower, x, delta, layer.ln_1_weight, layer.ln_1_bias)
            projected = project(layer, y)
        attended = passes.attend(tower.heads, projected, prefixes[number], pairs)
        x, delta = after_attention(tower, passes, layer, x, attended)
    if len(tower.layers) == 1:
        y = entry
    else:
        x, y = passes.add_norm(tower, x, delta, tower.layers[-1].ln_1_weight, tower.layers[-1].ln_1_bias)
    tokens = torch.cat([passes.of_prefix(prefixes[-1], pairs), y], dim=1)
    if tails.pooled is None:
        mask = None if lengths is None else pairs.mask[..., -1:, :]
        return last_block(tower, passes, x[:, -1], y[:, -1], tokens, mask)
    rows, pooled = torch.arange(len(x), device=x.device), tails.pooled.index_select(0, second)
    mask = pairs.mask[rows, :, pooled][:, :, None]
    return last_block(tower, passes, x[rows, pooled], y[rows, pooled], tokens, mask)


def token_bytes(tower: TextTower) -> int:
    """Upper estimate of what backward keeps of one tail or prefix token, all layers together.

    In widths W a layer: two inputs of LayerNorms, queries, keys and values of the prefix and the token, the attended
    value, and the hidden layer of the MLP; the last layer, which keeps less, counts as one of them.
    """
    hidden = len(tower.layers[0].fc_bias)
    width = len(tower.layers[0].proj_bias)
    return len(tower.layers) * (10 * width + hidden) * tower.projection.element_size()


def _tails(tower: TextTower, tokens: Tensor, positions: Tensor) -> Tails:
    """Tails of tokens (J,T,W) at positions (J,T); padding may lie beyond the context."""
    x = tokens + tower.positional_embedding[positions.clamp(max=tower.context_length - 1)]
    layer = tower.layers[0]
    y = layer_norm(tower, x, layer.ln_1_weight, layer.ln_1_bias)
    return Tails(x, project(layer, y) if len(tower.layers) > 1 else y, None)


def _distinct(frame: Frame) -> list[int]:
    return sorted(set(frame.lengths))

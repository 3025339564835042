"""Prompts through a frozen text tower with a prefix KV cache; exact in real arithmetic.

The tower is causal, so the prefix [SOS, V_i, name_i] has the same hidden states whatever follows: the rest of the
single prompt of class i, or the suffix [V_j, name_j …] of any pair (i, j). SOS sees only itself: one row for all. In
the first layer a suffix has not met its prefix yet: queries, keys and values there depend on j (and its position)
alone. In the last layer only the pooled token is read. MATH.md, section "Text tower", has the derivations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_operations import BlockOperations, RaggedPairs, Stream
from .blocks import finish, last_block, project
from .reference import TextTower, layer_norm
from .sequences import PromptTemplate

PrefixCache = tuple[Tensor, ...]
"""States of N prefixes of S tokens, a tensor a layer: keys and values (N,S,2W), and for the last layer its input after
LayerNorm (N,S,W). S counts SOS, n vectors, and the longest name (shorter ones are padded)."""


class Prompts(NamedTuple):
    """Prompts of C classes: generated vectors, the constant tokens around them, and their cached prefixes."""

    vectors: Tensor
    """(C,n,W)"""
    template: PromptTemplate
    cache: PrefixCache | None = None
    """states of the C prefixes [SOS, V_c, name_c], from `encode_prompts`; None: they are computed where needed"""


class Suffixes(NamedTuple):
    """J token sequences that can follow a prefix."""

    x: Tensor
    """(J,T,W) input of the first layer, positions included"""
    entry: Tensor
    """(J,T,3W) queries, keys and values there; in a tower of one layer (J,T,W), x after its LayerNorm"""
    pooled: Tensor | None
    """(J,) token that the feature is read from; None: the last"""


class Encoded(NamedTuple):
    """What one pass leaves of N prompts."""

    cache: PrefixCache
    """states of the first `keep` prefixes"""
    features: Tensor | None
    """(N,D) of the single prompts, not normalised"""


def encode_prefixes(
    tower: TextTower,
    template: PromptTemplate,
    prompts: Tensor,
    operations: BlockOperations,
    *,
    keep: int,
    singles: bool = False,
) -> Encoded:
    """States of the prefixes [SOS, V_c, name_c], and from the same pass the features of the single prompts.

    A single prompt is its prefix and a few tokens more, EOS or mostly ".", EOS, which no token of the prefix sees.

    Args:
        prompts: (N,n,W); N is a multiple of C, and row r belongs to class r mod C.
        operations: implementation of the block operations.
        keep: states of how many prefixes, the first ones, to keep.
        singles: encode the ends of the single prompts too.
    """
    n, repeats = prompts.shape[1], len(prompts) // len(template.lengths)
    end = template.longest_tail + 1 if singles else 0
    suffix = template.token_suffix[:, : template.longest_name + end]
    tokens = torch.cat([prompts, suffix.repeat(repeats, 1, 1)], dim=1)
    count, length, width = tokens.shape
    positions = tower.positional_embedding
    # SOS is row 0 of all products, the N·length other tokens come after it: N suffixes of one prefix, SOS.
    x = torch.cat([(template.sos + positions[0])[None], (tokens + positions[1 : 1 + length]).flatten(0, 1)])
    rows = torch.arange(count, device=x.device)
    after_sos = RaggedPairs(
        torch.zeros_like(rows), rows, prefixes=1, suffixes=count, prefix_tokens=1, suffix_tokens=length
    )

    def with_sos(rows: Tensor, count: int, tokens: int) -> Tensor:
        """SOS and the first tokens of the first sequences, (count,1+tokens,…)."""
        live = rows[1:].unflatten(0, (-1, length))[:count, :tokens]
        return torch.cat([rows[:1].expand(count, 1, -1), live], dim=1)

    stream, states, kept = Stream(x), [], n + template.longest_name
    for layer in tower.layers[:-1]:
        stream, qkv = project(tower, operations, layer, stream)
        if keep:
            states.append(with_sos(qkv[:, width:], keep, kept))
        # The states of SOS are constants of the tower.
        sos, live = qkv[:1, width:].detach(), qkv[1:].unflatten(0, (count, length))
        attended = operations.attention(tower.heads, live, sos[None], after_sos)
        attended = torch.cat([sos[:, width:], attended.flatten(0, 1)])
        stream = finish(tower, operations, layer, stream, attended)
    last = tower.layers[-1]
    x, y = operations.add_norm(tower, stream.x, stream.delta, last.ln_1_weight, last.ln_1_bias)
    if keep:
        states.append(with_sos(y, keep, kept))
    if not singles:
        return Encoded(tuple(states), None)
    seen = with_sos(y, count, length)
    if template.named:
        pooled = (1 + n + template.ends).repeat(repeats)
        mask = (torch.arange(1 + length, device=x.device) <= pooled[:, None])[:, None, None]
        query, x = seen[rows, pooled], x[rows * length + pooled]
    else:
        mask, query, x = None, seen[:, -1], x[1:].unflatten(0, (count, length))[:, -1]
    return Encoded(tuple(states), last_block(tower, operations, x, query, seen, mask))


def pair_suffixes(tower: TextTower, template: PromptTemplate, prompts: Tensor) -> Suffixes:
    """Suffixes after the prefix of i in the pair prompts (i, j): [V_j, EOS]; in prefix mode [V_j, name_j, "."].

    Positions start after name_i, so there is one suffix for each j and each length that a name has: C suffixes a
    length, shortest first.

    Args:
        prompts: (C,n,W).
    """
    n = prompts.shape[1]
    tokens = torch.cat([prompts, template.token_suffix[:, : template.longest_name + 1]], dim=1)
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    starts = [1 + n + length for length in _distinct_lengths(template)]
    positions = torch.stack([start + steps for start in starts])[:, None].expand(-1, len(tokens), -1)
    suffixes = _suffixes(tower, tokens.repeat(len(starts), 1, 1), positions.flatten(0, 1))
    if not template.named:
        return suffixes
    return suffixes._replace(pooled=(n + template.name_lengths).repeat(len(starts)))


def pair_suffix_index(template: PromptTemplate, first: Tensor, second: Tensor) -> Tensor:
    """(R,) the suffixes of pairs among those of `pair_suffixes`."""
    # Comparisons with host numbers: no index tensor has to be copied to the device.
    groups = sum((template.name_lengths[first] >= length).long() for length in _distinct_lengths(template)[1:])
    return second + groups * len(template.lengths)


def unpadded_lengths(template: PromptTemplate, first: Tensor, prompt_length: int) -> Tensor | None:
    """(R,) tokens of the prefixes of classes `first` (R,) that are not padding; None without names: all."""
    return 1 + prompt_length + template.name_lengths[first] if template.named else None


def encode_suffixes(
    tower: TextTower,
    cache: PrefixCache,
    suffixes: Suffixes,
    prefix_index: Tensor,
    suffix_index: Tensor,
    prefix_lengths: Tensor | None,
    operations: BlockOperations,
) -> Tensor:
    """Features of R sequences, each a cached prefix and a suffix.

    Args:
        cache: of N prefixes.
        suffixes: J suffixes.
        prefix_index, suffix_index, prefix_lengths: as in `RaggedPairs`.
        operations: implementation of the block operations.

    Returns:
        (R,D), not normalised.
    """
    pairs = RaggedPairs(
        prefix_index,
        suffix_index,
        prefixes=len(cache[0]),
        suffixes=len(suffixes.x),
        prefix_tokens=cache[0].shape[1],
        suffix_tokens=suffixes.x.shape[1],
        prefix_lengths=prefix_lengths,
    )
    x, entry = (operations.gather_suffix(table, pairs) for table in (suffixes.x, suffixes.entry))
    stream, qkv = Stream(x), entry
    for number, layer in enumerate(tower.layers[:-1]):
        if number > 0:
            stream, qkv = project(tower, operations, layer, stream)
        attended = operations.attention(tower.heads, qkv, cache[number], pairs)
        stream = finish(tower, operations, layer, stream, attended)
    if len(tower.layers) == 1:
        y = entry
    else:
        last = tower.layers[-1]
        x, y = operations.add_norm(tower, stream.x, stream.delta, last.ln_1_weight, last.ln_1_bias)
    tokens = torch.cat([operations.gather_prefix(cache[-1], pairs), y], dim=1)
    if suffixes.pooled is None:
        mask = None if prefix_lengths is None else pairs.mask[..., -1:, :]
        return last_block(tower, operations, x[:, -1], y[:, -1], tokens, mask)
    rows, pooled = torch.arange(len(x), device=x.device), suffixes.pooled.index_select(0, suffix_index)
    mask = pairs.mask[rows, :, pooled][:, :, None]
    return last_block(tower, operations, x[rows, pooled], y[rows, pooled], tokens, mask)


def _suffixes(tower: TextTower, tokens: Tensor, positions: Tensor) -> Suffixes:
    """Suffixes of tokens (J,T,W) at positions (J,T); padding may lie beyond the context."""
    x = tokens + tower.positional_embedding[positions.clamp(max=tower.context_length - 1)]
    layer = tower.layers[0]
    y = layer_norm(tower, x, layer.ln_1_weight, layer.ln_1_bias)
    if len(tower.layers) > 1:
        y = F.linear(y, layer.in_proj_weight, layer.in_proj_bias)
    return Suffixes(x, y, None)


def _distinct_lengths(template: PromptTemplate) -> list[int]:
    return sorted(set(template.lengths))

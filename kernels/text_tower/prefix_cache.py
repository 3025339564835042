"""Prompts through a frozen text tower with a prefix KV cache; exact in real arithmetic.

The tower is causal, so the prefix [SOS, V_i, name_i] has the same hidden states whatever follows: the rest of the
single prompt of class i, or the suffix [V_j, name_j …] of any pair (i, j). SOS sees only itself: one row for all. In
the first layer a suffix has not met its prefix yet: queries, keys and values there depend on j (and its position)
alone. In the last layer only the pooled token is read. MATH.md, section "Text tower", has the derivations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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

    def pooled_of(self, index: Tensor) -> Tensor | None:
        """`pooled` of the suffixes `index` (R,)."""
        return None if self.pooled is None else self.pooled.index_select(0, index)


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
        *(torch.zeros_like(rows), rows),
        prefixes=1,
        suffixes=count,
        prefix_tokens=1,
        suffix_tokens=length,
        pooled=(n + template.ends).repeat(repeats) if singles and template.named else None,
    )

    def split(rows: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """SOS and the other tokens (N,length,…) of rows; the cache's states, columns from `first` on, are taken."""
        live, state = _Split.apply(rows, (count, length), (keep, n + template.longest_name), first)
        if keep:
            states.append(state)
        return rows[:1, first:].detach(), live

    states: list[Tensor] = []
    stream = Stream(x)
    for layer in tower.layers[:-1]:
        stream, qkv = project(tower, operations, layer, stream)
        sos, live = split(qkv, width)
        attended = operations.attention(tower.heads, live, sos[None], after_sos)
        attended = torch.cat([sos[:, width:], attended.flatten(0, 1)])
        stream = finish(tower, operations, layer, stream, attended)
    last = tower.layers[-1]
    x, query, y = operations.pooled_norm(tower, stream, last.ln_1_weight, last.ln_1_bias, after_sos)
    sos, live = split(y, 0)
    if not singles:
        return Encoded(tuple(states), None)
    return Encoded(tuple(states), last_block(tower, operations, x, query, sos[None], live, after_sos))


class _Split(torch.autograd.Function):
    """Rows of a pass over prompts as sequences, and what the cache keeps of them.

    Slices would each leave a whole tensor of zeros to add in backward. SOS, row 0, is a constant of the tower: what
    backward sends there is dropped, and may be anything.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, shape: tuple[int, int], kept: tuple[int, int], first: int
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.rows, ctx.shape, ctx.kept, ctx.first = rows.shape, shape, kept, first
        live, (sequences, tokens) = rows[1:].unflatten(0, shape), kept
        sos = rows[:1, first:].expand(sequences, 1, -1)
        return live, torch.cat([sos, live[:sequences, :tokens, first:]], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_live: Tensor | None, d_state: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_live is None and d_state is None:
            return None, None, None, None
        if d_live is None:
            assert d_state is not None
            d_rows = d_state.new_zeros(ctx.rows)
        else:
            rows = d_live.flatten(0, 1)
            d_rows = torch.cat([rows[:1], rows])
        if d_state is not None:
            sequences, tokens = ctx.kept
            live = d_rows[1:].unflatten(0, ctx.shape)
            live[:sequences, :tokens, ctx.first :].add_(d_state[:, 1:])  # `+=` would also copy it onto itself
        return d_rows, None, None, None


def pair_suffixes(tower: TextTower, template: PromptTemplate, prompts: Tensor) -> Suffixes:
    """Suffixes after the prefix of i in the pair prompts (i, j): [V_j, EOS]; in prefix mode [V_j, name_j, "."].

    Positions start after name_i, so there is one suffix for each j and each length that a name has: C suffixes a
    length, shortest first.

    Args:
        prompts: (C,n,W).
    """
    n = prompts.shape[1]
    tokens = torch.cat([prompts, template.token_suffix[:, : template.longest_name + 1]], dim=1)
    groups = [tokens + _positions(tower, 1 + n + length, tokens.shape[1]) for length in _distinct_lengths(template)]
    x = groups[0] if len(groups) == 1 else torch.cat(groups)
    layer = tower.layers[0]
    entry = layer_norm(tower, x, layer.ln_1_weight, layer.ln_1_bias)
    if len(tower.layers) > 1:
        entry = F.linear(entry, layer.in_proj_weight, layer.in_proj_bias)
    return Suffixes(x, entry, (n + template.name_lengths).repeat(len(groups)) if template.named else None)


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
    pairs: RaggedPairs,
    operations: BlockOperations,
) -> Tensor:
    """Features of R sequences, each a cached prefix and a suffix.

    Args:
        cache: of N prefixes.
        suffixes: J suffixes.
        pairs: prefix and suffix of each sequence.
        operations: implementation of the block operations.

    Returns:
        (R,D), not normalised.
    """
    x, entry = (operations.gather_suffix(table, pairs) for table in (suffixes.x, suffixes.entry))
    stream, qkv = Stream(x), entry
    for number, layer in enumerate(tower.layers[:-1]):
        if number > 0:
            stream, qkv = project(tower, operations, layer, stream)
        attended = operations.attention(tower.heads, qkv, cache[number], pairs)
        stream = finish(tower, operations, layer, stream, attended)
    if len(tower.layers) == 1:
        x, query, y = pairs.pool(x), pairs.pool(entry), entry
    else:
        last = tower.layers[-1]
        x, query, y = operations.pooled_norm(tower, stream, last.ln_1_weight, last.ln_1_bias, pairs)
    return last_block(tower, operations, x, query, cache[-1], y, pairs)


def _positions(tower: TextTower, start: int, count: int) -> Tensor:
    """(count,W) of the positions from `start` on; padding may lie beyond the context and takes the last one."""
    rows = tower.positional_embedding[start : start + count]
    missing = count - len(rows)
    return torch.cat([rows, tower.positional_embedding[-1:].expand(missing, -1)]) if missing else rows


def _distinct_lengths(template: PromptTemplate) -> list[int]:
    return sorted(set(template.lengths))

"""Texts of different lengths through a text tower that may train, without their padding; exact in real arithmetic.

The tower is causal and its feature is read at one token, so tokens behind that one do not matter. Products and norms
run over the R tokens that are left, one text after the other; torch's attention alone sees a grid of N texts by T
tokens, kernels read the rows. The last block computes the token that is read and nothing else. Gradients reach all
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import resolve, with_triton
from .block_operations import BlockOperations, RaggedPairs, Stream
from .blocks import finish, last_block, project
from .eager import EAGER, QUICK
from .packed_cpu import attention_by_text, fits, follow_on, quick_gelu_mlp
from .reference import TextLayer, TextTower


class Packing(NamedTuple):
    """Where R tokens of N texts stand; rows that fill R up to a fixed number belong to no text."""

    positions: Tensor
    """(R,) int64, in their text"""
    slots: Tensor
    """(R,) int64, in the flat grid of N·T; N·T for a row that fills up"""
    ends: Tensor
    """(N,) int64, rows of the tokens that features are read from"""
    seen: Tensor
    """(N,T) bool, tokens of the grid up to these"""


def pack_texts(pooled: Tensor, tokens: int, rows: int | None = None) -> Packing:
    """Packing of N texts.

    Args:
        pooled: (N,) int64, on the CPU, so that nothing waits for a device: position of each text's last token that
            matters, below `tokens`.
        tokens: T, columns of the grid.
        rows: R; None: as many as there are tokens.

    Raises:
        ValueError: more tokens than rows.
    """
    lengths = pooled + 1
    starts = lengths.cumsum(0) - lengths
    text = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    positions = torch.arange(len(text)) - starts[text]
    missing = 0 if rows is None else rows - len(text)
    if missing < 0:
        raise ValueError(f"pack_texts: {len(text)} tokens are more than {rows} rows")
    slots = F.pad(text * tokens + positions, (0, missing), value=len(lengths) * tokens)
    seen = torch.arange(tokens) <= pooled[:, None]
    return Packing(F.pad(positions, (0, missing)), slots, starts + pooled, seen)


def encode_packed(tower: TextTower, embeddings: Tensor, packing: Packing, *, impl: str = "auto") -> Tensor:
    """Text features (N,D), not normalised, as `encode` gives them; gradients flow to embeddings and weights.

    Args:
        tower: the tower.
        embeddings: (R,W), before the positional embedding.
        packing: where they stand.
        impl: of attention and QuickGELU: triton (chosen by auto on a GPU; attention in float32, or of more than 128
            tokens, on sm_80 64, stays in torch), eager, or auto.

    Raises:
        ValueError: an `impl` that cannot run.
    """
    operations, attend = trained(impl, embeddings)
    stream = Stream(embeddings + tower.positional_embedding[packing.positions])
    for layer in tower.layers[:-1]:
        stream, qkv = project(tower, operations, layer, stream)
        stream = finish(tower, operations, layer, stream, attend(tower.heads, qkv, packing))
    last = tower.layers[-1]
    x, y = operations.add_norm(tower, stream.x, stream.delta, last.ln_1_weight, last.ln_1_bias)
    texts, tokens = packing.seen.shape
    rows, own = torch.arange(texts, device=x.device), _grid(y, packing)
    alone = RaggedPairs(
        rows,
        rows,
        prefixes=texts,
        suffixes=texts,
        prefix_tokens=0,
        suffix_tokens=tokens,
        pooled=packing.seen.sum(dim=1) - 1,
    )
    return last_block(tower, operations, x[packing.ends], y[packing.ends], own[:, :0], own, alone)


Attend = Callable[[int, Tensor, Packing], Tensor]
"""number of heads, queries, keys and values (R,3W), where they stand → what each token attends to (R,W)"""


def trained(impl: str, like: Tensor) -> tuple[BlockOperations, Attend]:
    """Operations of blocks that train, and their attention, for tensors like this one; `impl` as of `encode_packed`.

    Raises:
        ValueError: an `impl` that cannot run.
    """
    return resolve(impl, with_triton({"eager": _in_torch}, _with_kernels, like))()


def _in_torch() -> tuple[BlockOperations, Attend]:
    return TRAINED, _attend


def _with_kernels() -> tuple[BlockOperations, Attend]:
    from .triton.packed_attention import can_attend, packed_attention  # import triton
    from .triton.quick_gelu import mlp as quick_mlp

    def mlp(tower: TextTower, layer: TextLayer, y: Tensor) -> Tensor:
        return (quick_mlp if tower.activation == "quick_gelu" else _mlp)(tower, layer, y)

    def attend(heads: int, qkv: Tensor, packing: Packing) -> Tensor:
        tokens = packing.seen.shape[1]
        if not can_attend(qkv, heads, tokens):
            return _attend(heads, qkv, packing)
        return packed_attention(qkv, packing.ends, heads, tokens)

    return TRAINED._replace(mlp=mlp), attend


def _attend(heads: int, qkv: Tensor, packing: Packing) -> Tensor:
    if fits(qkv) and follow_on(packing.ends, len(qkv)):
        return attention_by_text(heads, qkv, packing.ends)
    grid = _grid(qkv, packing)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in grid.chunk(3, dim=-1))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2).flatten(0, 1)
    return attended.index_select(0, packing.slots.clamp(max=len(attended) - 1))


def _grid(rows: Tensor, packing: Packing) -> Tensor:
    """(R,F) → (N,T,F), zeros behind a text's end; one slot more takes the rows that fill up."""
    texts, tokens = packing.seen.shape
    flat = rows.new_zeros(texts * tokens + 1, rows.shape[-1]).index_copy(0, packing.slots, rows)
    return flat[:-1].unflatten(0, (texts, tokens))


def _mlp(tower: TextTower, layer: TextLayer, y: Tensor) -> Tensor:
    """`BlockOperations.mlp` with gradients of the weights; QuickGELU is silu, its scales are in the products."""
    if tower.activation != "quick_gelu":
        return F.linear(F.gelu(F.linear(y, layer.fc_weight, layer.fc_bias)), layer.proj_weight, layer.proj_bias)
    weights = layer.fc_weight, layer.fc_bias, layer.proj_weight, layer.proj_bias
    if y.ndim == 2 and fits(y, *weights):
        return quick_gelu_mlp(y, *weights)
    hidden = torch.addmm(layer.fc_bias, y, layer.fc_weight.T, beta=QUICK, alpha=QUICK)
    return torch.addmm(layer.proj_bias, F.silu(hidden), layer.proj_weight.T, alpha=1 / QUICK)


TRAINED = EAGER._replace(mlp=_mlp)

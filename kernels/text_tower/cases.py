"""Blocks of the text tower in a step at production shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..cases import HEADS, LAYERS, PAIRS, C, Case, G, N, W, empty
from .triton import add_norm, attention, gather, quick_gelu

FIRST = 4
"""prefixes that the first chunk's pairs continue"""
NAME = 8
"""tokens of the longest class name, in prefix mode"""


def _prefixes(dtype: torch.dtype) -> None:
    """Single prompts and their prefixes: G·C sequences of n vectors and EOS after SOS, a prefix of one token."""
    rows = 1 + G * C * (N + 1)
    for _ in range(LAYERS - 1):
        _attention(dtype, prefixes=1, prefix_tokens=1, suffixes=G * C, tokens=N + 1, by_prefix=False)
        _mlp(dtype, rows)
    for _ in range(2 * (LAYERS - 1)):
        _add_norm(dtype, rows)
    _last_block(dtype, G * C)


def _suffixes(dtype: torch.dtype, prefixes: int, tables: int, tokens: int, sequences: int) -> None:
    """`sequences` of `tokens` after prefixes of SOS and n vectors; the last block is for one token each."""
    for _ in range(LAYERS - 1):
        _attention(dtype, prefixes, 1 + N, sequences, tokens, by_prefix=True)
        _mlp(dtype, sequences * tokens)
    for _ in range(2 * (LAYERS - 1)):
        _add_norm(dtype, sequences * tokens)
    _last_block(dtype, sequences)
    order, starts = (empty(count, dtype=torch.int64) for count in (sequences, tables + 1))
    for width in (W, 3 * W):
        gather.run_gather_backward(empty(sequences, tokens, width, dtype=dtype), order, starts)
    starts = empty(prefixes + 1, dtype=torch.int64)
    gather.run_gather_backward(empty(sequences, 1 + N, W, dtype=dtype), None, starts)


def _last_block(dtype: torch.dtype, sequences: int) -> None:
    """One token a sequence."""
    _mlp(dtype, sequences)
    for _ in range(2):
        _add_norm(dtype, sequences)


def _named_pairs(dtype: torch.dtype) -> None:
    """Attention as prefix mode changes it: names lengthen prefixes and suffixes, and prefixes are padded."""
    for _ in range(LAYERS - 1):
        _attention(dtype, FIRST, 1 + N + NAME, PAIRS, N + NAME + 1, by_prefix=True, padded=True)


def _attention(
    dtype: torch.dtype,
    prefixes: int,
    prefix_tokens: int,
    suffixes: int,
    tokens: int,
    *,
    by_prefix: bool,
    padded: bool = False,
) -> None:
    qkv, prefix = empty(suffixes, tokens, 3 * W, dtype=dtype), empty(prefixes, prefix_tokens, 2 * W, dtype=dtype)
    starts, lengths = (empty(count, dtype=torch.int64) for count in (prefixes + 1, suffixes))
    ragged = (starts, lengths if padded else None)
    out, lse = attention.run_attention(qkv, prefix, *ragged, HEADS)
    attention.run_attention_backward(torch.empty_like(out), qkv, prefix, *ragged, lse, HEADS, by_prefix)


def _mlp(dtype: torch.dtype, rows: int) -> None:
    x = empty(rows, 4 * W, dtype=dtype)
    quick_gelu.run_quick_gelu(x)
    quick_gelu.run_quick_gelu_backward(torch.empty_like(x), x)


def _add_norm(dtype: torch.dtype, rows: int) -> None:
    x, delta, weight, bias = (empty(*shape, dtype=dtype) for shape in ((rows, W), (rows, W), (W,), (W,)))
    total, normal, statistics = add_norm.run_add_norm(x, delta, weight, bias, 1e-5)
    add_norm.run_add_norm_backward(torch.empty_like(total), torch.empty_like(normal), total, statistics, weight)


def _flops(products: int) -> Callable[[Mapping[str, Any]], float]:
    def flops(a: Mapping[str, Any]) -> float:
        width, seen = a["qkv"].shape[2] // 3, a["PREFIX_TOKENS"] + a["TOKENS"]
        return products * 2.0 * a["qkv"].shape[0] * a["TOKENS"] * seen * width

    return flops


_ATTENTION = {"_attention_kernel": _flops(2), "_attention_backward_kernel": _flops(5)}
CASES = (
    Case("text tower: prefixes and single prompts", _prefixes, flops=_ATTENTION),
    Case("text tower: pairs of a chunk", lambda dtype: _suffixes(dtype, FIRST, C, N + 1, PAIRS), flops=_ATTENTION),
    Case("text tower: pairs with class names, attention", _named_pairs, flops=_ATTENTION),
)

"""Blocks of the text tower in a step at production shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

import torch

from ..cases import HEADS, LAYERS, PAIRS, B, C, Case, G, N, W, empty
from ..launch import overlapped
from .triton import add_norm, attention, gather, packed_attention, pooled_attention, pooled_norm, products, quick_gelu

FIRST = 5
"""prefixes that the first chunk's pairs continue"""
NAME = 8
"""tokens of the longest class name, in prefix mode"""


def _prefixes(dtype: torch.dtype) -> None:
    """Single prompts and their prefixes: G·C sequences of n vectors and EOS after SOS, a prefix of one token."""
    for _ in range(LAYERS - 1):
        _attention(dtype, prefixes=1, prefix_tokens=1, suffixes=G * C, tokens=N + 1, by_prefix=False)
    _blocks(dtype, 1 + G * C * (N + 1))
    _last_block(dtype, 1, 1, G * C, N + 1, by_prefix=False)


def _pairs(dtype: torch.dtype) -> None:
    """Pairs after prefixes of SOS and n vectors."""
    for _ in range(LAYERS - 1):
        _attention(dtype, FIRST, 1 + N, PAIRS, N + 1, by_prefix=True)
    _blocks(dtype, PAIRS * (N + 1))
    _last_block(dtype, FIRST, 1 + N, PAIRS, N + 1, by_prefix=True)
    order, starts = (empty(count, dtype=torch.int64) for count in (PAIRS, C + 1))
    for width in (W, 3 * W):
        gather.run_gather_backward(empty(PAIRS, N + 1, width, dtype=dtype), order, starts)


def _blocks(dtype: torch.dtype, rows: int) -> None:
    """All blocks but the last without their attention, of the products that are chosen for so many rows."""
    if products.choose(empty(rows, W, dtype=dtype)) == "folded":
        for number in range(LAYERS - 1):
            _products(dtype, rows, project=number < LAYERS - 2)
        return
    for _ in range(LAYERS - 1):
        _mlp(dtype, rows)
    for _ in range(2 * LAYERS - 3):
        _add_norm(dtype, rows)


def _last_block(
    dtype: torch.dtype, prefixes: int, prefix_tokens: int, sequences: int, tokens: int, *, by_prefix: bool
) -> None:
    """One token a sequence."""
    total, weight = empty(sequences * tokens, W, dtype=dtype), empty(W, dtype=dtype)
    total, normal, statistics = add_norm.run_add_norm(total, total, weight, weight, 1e-5)
    x, prefix = empty(sequences, W, dtype=dtype), empty(prefixes, prefix_tokens, W, dtype=dtype)
    query, own = empty(HEADS, sequences, W, dtype=dtype), normal.view(sequences, tokens, W)
    index, starts = (empty(count, dtype=torch.int64) for count in (sequences, prefixes + 1))
    given = query, prefix, own, index, None, None
    out, lse = pooled_attention.run_pooled_attention(*given, 0.125)
    pooled_attention.run_pooled_attention_backward(out, *given, starts, lse, 0.125, by_prefix)
    pooled_norm.run_pooled_norm_backward(x, x, normal, total, statistics, weight, None, tokens)
    if products.choose(x) == "folded":
        _products(dtype, sequences, project=False)
        return
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


def _products(dtype: torch.dtype, rows: int, *, project: bool = True) -> None:
    """A block's products with what stands around them, forward and backward, and the next block's projection."""
    hidden = 4 * W
    x, bias, weight = empty(rows, W, dtype=dtype), empty(W, dtype=dtype), empty(W, W, dtype=dtype)
    fc, proj, qkv = (empty(*shape, dtype=dtype) for shape in ((hidden, W), (W, hidden), (3 * W, W)))
    sums, wide = empty(hidden), empty(3 * W)
    middle, moments = products.run_add_linear(x, weight, bias, x)
    inner, activated, statistics = products.run_linear(middle, fc, moments, sums, sums, 1e-5, "both")
    out, moments = products.run_add_linear(activated, proj, bias, middle)
    if project:
        _, _, outer = products.run_linear(out, qkv, moments, wide, wide, 1e-5, "out")
        add_norm.run_add_norm_backward(out, middle, out, outer, None)
    d, row_sums = products.run_activation_backward(out, proj, inner, sums, sums)
    products.run_norm_backward(d, fc, row_sums, statistics, middle, out)


def _all_products(dtype: torch.dtype) -> None:
    """Those of a block, and with QuickGELU alone in the epilogue; tiles by shape."""
    rows, hidden = PAIRS * (N + 1), 4 * W
    _products(dtype, rows)
    x, inner = empty(rows, W, dtype=dtype), empty(rows, hidden, dtype=dtype)
    products.run_linear(x, empty(hidden, W, dtype=dtype), None, None, empty(hidden, dtype=dtype), 0.0, "both")
    products.run_activation_backward(x, empty(W, hidden, dtype=dtype), inner, None, None)


def _wide_products(dtype: torch.dtype) -> None:
    with products.use("folded", tiles="wide"):
        _all_products(dtype)


def _small_products(dtype: torch.dtype) -> None:
    with products.use("folded", tiles="small"):
        _all_products(dtype)


def _packed_texts(dtype: torch.dtype) -> None:
    """Attention of phase 1: reports of 64 tokens, and of 77 where the kernels take them."""
    for tokens in (64, 77):
        if not packed_attention.can_attend(empty(1, 3 * W, dtype=dtype), HEADS, tokens):
            continue
        qkv, ends = empty(B * tokens, 3 * W, dtype=dtype), empty(B, dtype=torch.int64)
        out = packed_attention.run_packed_attention(qkv, ends, HEADS, tokens)
        packed_attention.run_packed_attention_backward(out, qkv, ends, HEADS, tokens)


def _overlapped_pairs(dtype: torch.dtype) -> None:
    """Every kernel set up while the one before ends, where a GPU can do it."""
    with overlapped():
        _pairs(dtype)


def _add_norm(dtype: torch.dtype, rows: int) -> None:
    x, delta, weight, bias = (empty(*shape, dtype=dtype) for shape in ((rows, W), (rows, W), (W,), (W,)))
    total, normal, statistics = add_norm.run_add_norm(x, delta, weight, bias, 1e-5)
    add_norm.run_add_norm_backward(torch.empty_like(total), torch.empty_like(normal), total, statistics, weight)


def _flops(products: int) -> Callable[[Mapping[str, Any]], float]:
    def flops(a: Mapping[str, Any]) -> float:
        width, seen = a["qkv"].shape[2] // 3, a["PREFIX_TOKENS"] + a["TOKENS"]
        return products * 2.0 * a["qkv"].shape[0] * a["TOKENS"] * seen * width

    return flops


def _turns(a: Mapping[str, Any]) -> int:
    """A turn is a tile of suffixes and a head; a prefix's last tile may not be full, which is not counted."""
    return ceil(a["qkv"].shape[0] / a["TAILS"]) * a["HEADS"]


def _product_flops(a: Mapping[str, Any]) -> float:
    return 2.0 * a["rows"] * a["columns"] * a["depth"]


def _pooled_flops(products: int) -> Callable[[Mapping[str, Any]], float]:
    def flops(a: Mapping[str, Any]) -> float:
        seen = a["prefix_tokens"] + a["tokens"]
        return products * 2.0 * a["query"].shape[1] * a["heads"] * seen * a["width"]

    return flops


def _packed_flops(products: int) -> Callable[[Mapping[str, Any]], float]:
    def flops(a: Mapping[str, Any]) -> float:
        rows, width = a["rows"], a["width"]
        return products * 2.0 * rows * (rows / a["texts"]) * width

    return flops


_FLOPS = {
    "_packed_attention_kernel": _packed_flops(2),
    "_packed_attention_backward_kernel": _packed_flops(5),
    "_attention_kernel": _flops(2),
    "_attention_backward_kernel": _flops(5),
    "_pooled_attention_kernel": _pooled_flops(2),
    "_pooled_attention_backward_kernel": _pooled_flops(5),
    **dict.fromkeys(
        ("_linear_kernel", "_add_linear_kernel", "_activation_backward_kernel", "_norm_backward_kernel"), _product_flops
    ),
}
_WORK: dict[str, Any] = {
    "flops": _FLOPS,
    "writes": {"_packed_attention_kernel": ("out",), "_packed_attention_backward_kernel": ("d_qkv",)},
    "trips": {"_attention_kernel": _turns, "_attention_backward_kernel": _turns},
}
CASES = (
    Case("text tower: prefixes and single prompts", _prefixes, **_WORK),
    Case("text tower: pairs of a chunk", _pairs, **_WORK),
    Case("text tower: pairs of a chunk, overlapped", _overlapped_pairs, **_WORK),
    Case("text tower: packed texts that train, attention", _packed_texts, **_WORK),
    Case("text tower: products of a block", _all_products, **_WORK),
    Case("text tower: products of a block, wide tiles", _wide_products, **_WORK),
    Case("text tower: products of a block, small tiles", _small_products, **_WORK),
    Case("text tower: pairs with class names, attention", _named_pairs, **_WORK),
)

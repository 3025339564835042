"""Kernels of a step forward. Letters of shapes: G decoders, C classes, H hidden width, B images; M = heads·B.

Programs: (blocks of columns or of rows, blocks of rows or heads, G); who calls a kernel from another says by TILE which
program it stands for. `x_batch` is the distance between the matrices of a stack x (launch.py); a stack without one is
contiguous.
"""

import triton
import triton.language as tl

from ...primitives import follow, tanh
from .tiles import (
    add_product,
    add_three_products,
    dot,
    extent,
    load_tile,
    load_transposed,
    load_vector,
    load_weight,
    place,
    row_statistics,
    store_tile,
)


@triton.jit
def gru_kernel(
    x,  # (G,C,3H) W_ih·x_0 + b_ih in the first step, afterwards (G,C,H) summed
    x_batch,
    state,  # (G,C,H) h_{i−1}; not read in the first step
    feedback,  # (G,3H,H) to r, z, n
    feedback_bias,  # (G,3H)
    recurrent,  # (G,3H,H) to u, r, z
    recurrent_bias,  # (G,3H)
    gates,  # (G,C,4H)
    gates_batch,
    inner,  # (G,C,H)
    classes,
    hidden,
    FIRST: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
    TILE=None,
):
    """The GRU cell: gates u, r, z, n where they are saved, and inner = n + z⊙(h − n)."""
    follow(OVERLAP)
    g = place(TILE, 2).to(tl.int64)
    rows, columns = place(TILE, 1) * BLOCK_C + tl.arange(0, BLOCK_C), place(TILE, 0) * BLOCK + tl.arange(0, BLOCK)
    rows_in = rows < classes
    inside = rows_in[:, None] & (columns < hidden)[None, :]
    x += g * x_batch
    state += g * classes * hidden
    recurrent_bias += g * 3 * hidden
    if FIRST:
        r = load_tile(x, 3 * hidden, rows, columns, inside).to(tl.float32)
        z = load_tile(x + hidden, 3 * hidden, rows, columns, inside).to(tl.float32)
        n = load_tile(x + 2 * hidden, 3 * hidden, rows, columns, inside).to(tl.float32)
        u = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    else:
        zeros = tl.zeros((BLOCK_C, BLOCK), tl.float32)
        weight = feedback + g * 3 * hidden * hidden
        r, z, n = add_three_products(zeros, zeros, zeros, x, rows, rows_in, weight, hidden, columns, BLOCK_K)
        weight = recurrent + g * 3 * hidden * hidden
        u, r, z = add_three_products(zeros, r, z, state, rows, rows_in, weight, hidden, columns, BLOCK_K)
        feedback_bias += g * 3 * hidden
        r += load_vector(feedback_bias, columns, hidden)[None, :]
        z += load_vector(feedback_bias + hidden, columns, hidden)[None, :]
        n += load_vector(feedback_bias + 2 * hidden, columns, hidden)[None, :]
    u += load_vector(recurrent_bias, columns, hidden)[None, :]
    r = tl.sigmoid(r + load_vector(recurrent_bias + hidden, columns, hidden)[None, :])
    z = tl.sigmoid(z + load_vector(recurrent_bias + 2 * hidden, columns, hidden)[None, :])
    n = tanh(n + r * u)
    value = n - z * n if FIRST else n + z * (load_tile(state, hidden, rows, columns, inside) - n)
    if SAVE:
        gates += g * gates_batch
        store_tile(gates, 4 * hidden, rows, columns, inside, u)
        store_tile(gates + hidden, 4 * hidden, rows, columns, inside, r)
        store_tile(gates + 2 * hidden, 4 * hidden, rows, columns, inside, z)
        store_tile(gates + 3 * hidden, 4 * hidden, rows, columns, inside, n)
    store_tile(inner + g * classes * hidden, hidden, rows, columns, inside, value)


@triton.jit
def linear_kernel(
    x,  # (G,C,I)
    x_batch,
    weight,  # (G,O,I), or (G,I,O) with INPUT_FIRST
    bias,  # (G,O) or None
    residual,  # (G,C,O) or None
    other,  # (G,C,O) or None
    other_batch,
    output,  # (G,C,O)
    output_batch,
    classes,
    inputs,
    outputs,
    NORMALISE: tl.constexpr,
    INPUT_FIRST: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
    TILE=None,
):
    """output = residual + other + bias + x·weightᵀ; with NORMALISE of LayerNorm(x) without scale and shift."""
    follow(OVERLAP)
    g = place(TILE, 2).to(tl.int64)
    rows, columns = place(TILE, 1) * BLOCK_C + tl.arange(0, BLOCK_C), place(TILE, 0) * BLOCK + tl.arange(0, BLOCK)
    rows_in = rows < classes
    inside = rows_in[:, None] & (columns < outputs)[None, :]
    x += g * x_batch
    weight += g * inputs * outputs
    sums = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    if NORMALISE:
        mean, rstd = row_statistics(x, inputs, rows, rows_in, EPS, BLOCK_C, BLOCK_K)
        for start in range(0, inputs, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            left = load_tile(x, inputs, rows, k, rows_in[:, None] & (k < inputs)[None, :])
            left = (left - mean[:, None]) * rstd[:, None]
            right = load_weight(weight, inputs, outputs, k, columns, INPUT_FIRST)
            sums = dot(left.to(weight.dtype.element_ty), right, sums)
    else:
        sums = add_product(
            sums, x, inputs, rows, rows_in, weight, inputs, outputs, columns, INPUT_FIRST, BLOCK_K
        )  # fmt: skip
    if bias is not None:
        sums += load_vector(bias + g * outputs, columns, outputs)[None, :]
    if residual is not None:
        sums += load_tile(residual + g * classes * outputs, outputs, rows, columns, inside).to(tl.float32)
    if other is not None:
        sums += load_tile(other + g * other_batch, outputs, rows, columns, inside).to(tl.float32)
    store_tile(output + g * output_batch, outputs, rows, columns, inside, sums)


@triton.jit
def self_attention_kernel(
    qkv,  # (A,C,3H)
    qkv_batch,
    attended,  # (A,C,H)
    lse,  # (A,heads,C) log-sum-exp of the scores, or None
    classes,
    hidden,
    factor,
    WIDTH: tl.constexpr,  # of a head
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
    TILE=None,
):
    """Self-attention of a block of queries in one head, over blocks of keys with a running maximum."""
    follow(OVERLAP)
    a, head, heads = place(TILE, 2).to(tl.int64), place(TILE, 1), extent(TILE, 1)
    rows, d = place(TILE, 0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    rows_in, d_in = rows < classes, d < WIDTH
    inside = rows_in[:, None] & d_in[None, :]
    qkv += a * qkv_batch + head * WIDTH
    q = load_tile(qkv, 3 * hidden, rows, d, inside)
    row_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, classes, BLOCK):
        others = start + tl.arange(0, BLOCK)
        others_in = others < classes
        k = load_transposed(qkv + hidden, 3 * hidden, others, d, d_in[:, None] & others_in[None, :])
        v = load_tile(qkv + 2 * hidden, 3 * hidden, others, d, others_in[:, None] & d_in[None, :])
        scores = dot(q, k, tl.zeros((BLOCK, BLOCK), tl.float32)) * factor
        scores = tl.where(others_in[None, :], scores, float("-inf"))
        before, row_max = row_max, tl.maximum(row_max, tl.max(scores, 1))
        alpha = tl.exp(before - row_max)
        weights = tl.exp(scores - row_max[:, None])
        total = total * alpha + tl.sum(weights, 1)
        sums = dot(weights.to(v.dtype), v, sums * alpha[:, None])
    store_tile(attended + a * classes * hidden + head * WIDTH, hidden, rows, d, inside, sums / total[:, None])
    if lse is not None:
        tl.store(lse + (a * heads + head) * classes + rows, row_max + tl.log(total), mask=rows_in)


@triton.jit
def cross_attention_kernel(
    pre_norm,  # (G,C,H)
    pre_norm_batch,
    scale,  # (G,H)
    shift,  # (G,H)
    query,  # (G,M,H)
    query_bias,  # (G,M)
    state,  # (G,C,H) h_i
    scores,  # (G,C,M)
    scores_batch,
    mixed,  # (G,C,M)
    classes,
    images,
    hidden,
    SAVE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
    TILE=None,
):
    """h_i = LayerNorm(pre_norm), its scores of the images in one head, where they are saved, and their softmax."""
    follow(OVERLAP)
    g, head, heads = place(TILE, 2).to(tl.int64), place(TILE, 1), extent(TILE, 1)
    rows, columns = place(TILE, 0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK)
    rows_in, columns_in = rows < classes, columns < images
    inside = rows_in[:, None] & columns_in[None, :]
    pre_norm += g * pre_norm_batch
    state += g * classes * hidden
    query += (g * heads + head) * images * hidden
    mean, rstd = row_statistics(pre_norm, hidden, rows, rows_in, EPS, BLOCK_C, BLOCK_K)
    sums = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    for start in range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_inside = rows_in[:, None] & (k < hidden)[None, :]
        h = (load_tile(pre_norm, hidden, rows, k, k_inside) - mean[:, None]) * rstd[:, None]
        h = h * load_vector(scale + g * hidden, k, hidden)[None, :]
        h += load_vector(shift + g * hidden, k, hidden)[None, :]
        # The programs of the heads take turns.
        mine = k // BLOCK_K % heads == head
        store_tile(state, hidden, rows, k, k_inside & mine[None, :], h)
        sums = dot(h.to(query.dtype.element_ty), load_weight(query, hidden, images, k, columns, False), sums)
    sums += load_vector(query_bias + (g * heads + head) * images, columns, images)[None, :]
    sums = sums.to(scores.dtype.element_ty)  # backward has the rounded ones
    width = heads * images
    if SAVE:
        store_tile(scores + g * scores_batch + head * images, width, rows, columns, inside, sums)
    sums = tl.where(columns_in[None, :], sums.to(tl.float32), float("-inf"))
    weights = tl.exp(sums - tl.max(sums, 1)[:, None])
    weights = weights / tl.sum(weights, 1)[:, None]
    store_tile(mixed + g * classes * width + head * images, width, rows, columns, inside, weights)

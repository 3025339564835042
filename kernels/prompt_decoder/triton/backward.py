"""Kernels of a step backward; letters, programs and strides as in forward.py. `d_x` is the gradient of x."""

import triton
import triton.language as tl

from ...primitives import follow
from .tiles import add_product, dot, extent, load_tile, load_vector, load_weight, place, store_tile


@triton.jit
def cross_attention_backward_kernel(
    d_summed,  # (G,C,H)
    d_summed_batch,
    value,  # (G,M,H)
    mixed,  # (G,C,M) the softmax
    mixed_batch,
    d_scores,  # (G,C,M)
    d_scores_batch,
    classes,
    images,
    hidden,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
    TILE=None,
):
    """Gradient of the scores of the images in one head."""
    follow(OVERLAP)
    g, head, heads = place(TILE, 2).to(tl.int64), place(TILE, 1), extent(TILE, 1)
    rows, columns = place(TILE, 0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK)
    rows_in, width = rows < classes, heads * images
    inside = rows_in[:, None] & (columns < images)[None, :]
    d_summed += g * d_summed_batch
    value += (g * heads + head) * images * hidden
    d_p = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    d_p = add_product(d_p, d_summed, hidden, rows, rows_in, value, hidden, images, columns, False, BLOCK_K)
    p = load_tile(mixed + g * mixed_batch + head * images, width, rows, columns, inside)
    d = p * (d_p - tl.sum(p * d_p, 1)[:, None])
    store_tile(d_scores + g * d_scores_batch + head * images, width, rows, columns, inside, d)


@triton.jit
def norm_linear_backward_kernel(
    d_normed,  # (G,C,H), before `scale`
    d_normed_batch,
    scale,  # (G,H) or None
    pre_norm,  # (G,C,H)
    pre_norm_batch,
    mean,  # (G,C)
    rstd,  # (G,C)
    weight,  # (G,H,H)
    d_pre_norm,  # (G,C,H), which a weight's gradient is made of
    d_pre_norm_batch,
    exact,  # (G,C,H) the same in float32
    d_input,  # (G,C,H)
    classes,
    hidden,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
    TILE=None,
):
    """Back through LayerNorm and the linear layer under it, pre_norm = … + input·weightᵀ."""
    follow(OVERLAP)
    g = place(TILE, 2).to(tl.int64)
    rows, columns = place(TILE, 1) * BLOCK_C + tl.arange(0, BLOCK_C), place(TILE, 0) * BLOCK + tl.arange(0, BLOCK)
    rows_in = rows < classes
    d_normed += g * d_normed_batch
    if scale is not None:
        scale += g * hidden
    pre_norm += g * pre_norm_batch
    weight += g * hidden * hidden
    d_pre_norm += g * d_pre_norm_batch
    exact += g * classes * hidden
    mean = tl.load(mean + g * classes + rows, mask=rows_in, other=0.0)
    rstd = tl.load(rstd + g * classes + rows, mask=rows_in, other=0.0)

    # d = d_normed⊙scale: x̄ = rstd·(d − Σd/H − x̂·Σ(d⊙x̂)/H).
    parts = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    along = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    for start in range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = rows_in[:, None] & (k < hidden)[None, :]
        d = load_tile(d_normed, hidden, rows, k, inside)
        if scale is not None:
            d *= load_vector(scale, k, hidden)[None, :]
        parts += d
        along += d * (load_tile(pre_norm, hidden, rows, k, inside) - mean[:, None])
    part = tl.sum(parts, 1) / hidden
    slope = tl.sum(along, 1) * rstd * rstd / hidden
    sums = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    for start in range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = rows_in[:, None] & (k < hidden)[None, :]
        d = load_tile(d_normed, hidden, rows, k, inside)
        if scale is not None:
            d *= load_vector(scale, k, hidden)[None, :]
        centred = load_tile(pre_norm, hidden, rows, k, inside) - mean[:, None]
        d = rstd[:, None] * (d - part[:, None] - centred * slope[:, None])
        # The programs of a row take turns.
        mine = inside & (k // BLOCK_K % extent(TILE, 0) == place(TILE, 0))[None, :]
        store_tile(exact, hidden, rows, k, mine, d)
        store_tile(d_pre_norm, hidden, rows, k, mine, d)
        sums = dot(d.to(weight.dtype.element_ty), load_weight(weight, hidden, hidden, k, columns, True), sums)
    inside = rows_in[:, None] & (columns < hidden)[None, :]
    store_tile(d_input + g * classes * hidden, hidden, rows, columns, inside, sums)


@triton.jit
def self_attention_backward_kernel(
    qkv,  # (G,C,3H)
    qkv_batch,
    attended,  # (G,C,H)
    attended_batch,
    lse,  # (G,heads,C)
    lse_batch,
    d_attended,  # (G,C,H)
    d_qkv,  # (G,C,3H)
    d_qkv_batch,
    classes,
    hidden,
    factor,
    WIDTH: tl.constexpr,  # of a head
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
    TILE=None,
):
    """Gradients in one head of a block of queries or, in the second half of the programs, of keys and values.

    A score between query i and key j has the gradient p_ij·(ō_i·v_j − δ_i), δ_i = ō_i·o_i, with o the result, ō its
    gradient.
    """
    follow(OVERLAP)
    g, head = place(TILE, 2).to(tl.int64), place(TILE, 1)
    blocks = extent(TILE, 0) // 2
    rows, d = place(TILE, 0) % blocks * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    rows_in, d_in = rows < classes, d < WIDTH
    inside = rows_in[:, None] & d_in[None, :]
    qkv += g * qkv_batch + head * WIDTH
    attended += g * attended_batch + head * WIDTH
    d_attended += g * classes * hidden + head * WIDTH
    lse += g * lse_batch + head * classes
    d_qkv += g * d_qkv_batch + head * WIDTH
    zeros = tl.zeros((BLOCK, BLOCK), tl.float32)
    if place(TILE, 0) < blocks:
        q = load_tile(qkv, 3 * hidden, rows, d, inside)
        d_o = load_tile(d_attended, hidden, rows, d, inside)
        o = load_tile(attended, hidden, rows, d, inside)
        delta = tl.sum(d_o.to(tl.float32) * o.to(tl.float32), 1)
        row_lse = tl.load(lse + rows, mask=rows_in, other=0.0)
        d_q = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for start in range(0, classes, BLOCK):
            others = start + tl.arange(0, BLOCK)
            others_in = others < classes
            k = load_tile(qkv + hidden, 3 * hidden, others, d, others_in[:, None] & d_in[None, :])
            v = load_tile(qkv + 2 * hidden, 3 * hidden, others, d, others_in[:, None] & d_in[None, :])
            p = tl.exp(dot(q, tl.trans(k), zeros) * factor - row_lse[:, None])
            p = tl.where(others_in[None, :], p, 0.0)
            d_scores = p * (dot(d_o, tl.trans(v), zeros) - delta[:, None])
            d_q = dot(d_scores.to(k.dtype), k, d_q)
        store_tile(d_qkv, 3 * hidden, rows, d, inside, d_q * factor)
    else:
        k = load_tile(qkv + hidden, 3 * hidden, rows, d, inside)
        v = load_tile(qkv + 2 * hidden, 3 * hidden, rows, d, inside)
        d_k = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        d_v = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for start in range(0, classes, BLOCK):
            others = start + tl.arange(0, BLOCK)
            others_in = others < classes
            others_inside = others_in[:, None] & d_in[None, :]
            q = load_tile(qkv, 3 * hidden, others, d, others_inside)
            d_o = load_tile(d_attended, hidden, others, d, others_inside)
            o = load_tile(attended, hidden, others, d, others_inside)
            delta = tl.sum(d_o.to(tl.float32) * o.to(tl.float32), 1)
            row_lse = tl.load(lse + others, mask=others_in, other=0.0)
            p = tl.exp(dot(k, tl.trans(q), zeros) * factor - row_lse[None, :])
            p = tl.where(others_in[None, :], p, 0.0)
            d_scores = p * (dot(v, tl.trans(d_o), zeros) - delta[None, :])
            d_v = dot(p.to(d_o.dtype), d_o, d_v)
            d_k = dot(d_scores.to(q.dtype), q, d_k)
        store_tile(d_qkv + hidden, 3 * hidden, rows, d, inside, d_k * factor)
        store_tile(d_qkv + 2 * hidden, 3 * hidden, rows, d, inside, d_v)


@triton.jit
def gru_backward_kernel(
    d_qkv,  # (G,C,3H)
    d_qkv_batch,
    weight,  # (G,3H,H) of qkv
    residual,  # (G,C,H) what else is added to the gradient of inner
    other,  # (G,C,H) and more of it
    gates,  # (G,C,4H)
    gates_batch,
    state,  # (G,C,H) h_{i−1}
    state_batch,
    d_gates,  # (G,C,4H)
    d_gates_batch,
    carry,  # (G,C,H) part of the gradient of h_{i−1}
    classes,
    hidden,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
    TILE=None,
):
    """Back through the projection to q, k, v and through the GRU cell."""
    follow(OVERLAP)
    g = place(TILE, 2).to(tl.int64)
    rows, columns = place(TILE, 1) * BLOCK_C + tl.arange(0, BLOCK_C), place(TILE, 0) * BLOCK + tl.arange(0, BLOCK)
    rows_in, wide = rows < classes, 3 * hidden
    inside = rows_in[:, None] & (columns < hidden)[None, :]
    d_qkv += g * d_qkv_batch
    weight += g * wide * hidden
    d_inner = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    d_inner = add_product(d_inner, d_qkv, wide, rows, rows_in, weight, wide, hidden, columns, True, BLOCK_K)
    d_inner += load_tile(residual + g * classes * hidden, hidden, rows, columns, inside)
    d_inner += load_tile(other + g * classes * hidden, hidden, rows, columns, inside)
    gates += g * gates_batch
    u = load_tile(gates, 4 * hidden, rows, columns, inside)
    r = load_tile(gates + hidden, 4 * hidden, rows, columns, inside)
    z = load_tile(gates + 2 * hidden, 4 * hidden, rows, columns, inside)
    n = load_tile(gates + 3 * hidden, 4 * hidden, rows, columns, inside)
    h = load_tile(state + g * state_batch, hidden, rows, columns, inside)
    d_n = d_inner * (1 - z) * (1 - n * n)
    d_u = d_n * r
    d_gates += g * d_gates_batch
    store_tile(d_gates, 4 * hidden, rows, columns, inside, d_u)
    store_tile(d_gates + hidden, 4 * hidden, rows, columns, inside, d_u * (1 - r) * u)
    store_tile(d_gates + 2 * hidden, 4 * hidden, rows, columns, inside, d_inner * (h - n) * (1 - z) * z)
    store_tile(d_gates + 3 * hidden, 4 * hidden, rows, columns, inside, d_n)
    store_tile(carry + g * classes * hidden, hidden, rows, columns, inside, d_inner * z)


@triton.jit
def recurrence_backward_kernel(
    d_gates,  # (G,C,4H)
    d_gates_batch,
    recurrent,  # (G,3H,H)
    feedback,  # (G,3H,H)
    carry,  # (G,C,H)
    d_state,  # (G,C,H) of h_{i−1}
    d_output,  # (G,C,H) of the output before: holds what comes from outside, is added to
    d_output_batch,
    classes,
    hidden,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
    TILE=None,
):
    """Gradients of h_{i−1}, in the first half of the programs, and of what is fed back, in the second."""
    follow(OVERLAP)
    count = extent(TILE, 2) // 2
    g = (place(TILE, 2) % count).to(tl.int64)
    rows, columns = place(TILE, 1) * BLOCK_C + tl.arange(0, BLOCK_C), place(TILE, 0) * BLOCK + tl.arange(0, BLOCK)
    rows_in, wide = rows < classes, 3 * hidden
    inside = rows_in[:, None] & (columns < hidden)[None, :]
    d_gates += g * d_gates_batch
    if place(TILE, 2) < count:
        weight = recurrent + g * wide * hidden
        sums = load_tile(carry + g * classes * hidden, hidden, rows, columns, inside)
        sums = add_product(sums, d_gates, 4 * hidden, rows, rows_in, weight, wide, hidden, columns, True, BLOCK_K)
        store_tile(d_state + g * classes * hidden, hidden, rows, columns, inside, sums)
    else:
        weight = feedback + g * wide * hidden
        d_gates += hidden  # r, z, n
        d_output += g * d_output_batch
        sums = load_tile(d_output, hidden, rows, columns, inside).to(tl.float32)
        sums = add_product(sums, d_gates, 4 * hidden, rows, rows_in, weight, wide, hidden, columns, True, BLOCK_K)
        store_tile(d_output, hidden, rows, columns, inside, sums)

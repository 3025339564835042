"""Kernels: products of a frozen block with LayerNorm, QuickGELU, their derivatives or the residual in the epilogue.

Four kernels share one main loop. A program takes tiles of the result, one after the other. Matrices arrive as tensor
descriptors where their layout allows it (TMA on sm_90 and newer), else as pointers. A tile's epilogue goes over it in
`PARTS` parts of columns, so that little is alive at a time. Row sums that LayerNorm needs leave a product as a pair of
numbers a row and part, or a row and tile, and the next product adds them up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...primitives import follow, quick_gelu_gate


@triton.jit
def _read(x, row, column, rows, columns, DESCRIPTORS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Block of a matrix (rows,columns) at (row, column), zeros beyond it."""
    if DESCRIPTORS:
        block = x.load([row, column])
    else:
        r, c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
        mask = (r < rows - row)[:, None] & (c < columns - column)[None, :]
        start = tl.cast(row, tl.int64) * columns + column
        block = tl.load(x + start + (r[:, None] * columns + c[None, :]), mask=mask, other=0)
    return block


@triton.jit
def _write(
    x, value, row, column, rows, columns, DESCRIPTORS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Store a block in a matrix (rows,columns) at (row, column)."""
    if DESCRIPTORS:
        x.store([row, column], value)
    else:
        r, c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
        mask = (r < rows - row)[:, None] & (c < columns - column)[None, :]
        start = tl.cast(row, tl.int64) * columns + column
        tl.store(x + start + (r[:, None] * columns + c[None, :]), value, mask=mask)


@triton.jit
def _part(x, NUMBER: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Part of a tile's columns; PARTS is a power of two."""
    if PARTS > 1:
        left, right = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        half = left if NUMBER < PARTS // 2 else right
        x = _part(half, NUMBER % (PARTS // 2), PARTS // 2, ROWS, COLUMNS // 2)
    return x


@triton.jit
def _multiply(
    a,  # (rows,depth)
    b,  # (columns,depth) if TRANSPOSED, else (depth,columns)
    row,
    column,
    rows,
    columns,
    depth,
    TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tile of a·bᵀ or a·b at (row, column), float32."""
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        x = _read(a, row, k, rows, depth, DESCRIPTORS, BLOCK_M, BLOCK_K)
        if TRANSPOSED:
            w = tl.trans(_read(b, column, k, columns, depth, DESCRIPTORS, BLOCK_N, BLOCK_K))
        else:
            w = _read(b, k, column, depth, columns, DESCRIPTORS, BLOCK_K, BLOCK_N)
        accumulator = tl.dot(x, w, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def _linear_kernel(
    a,  # (rows,depth)
    weight,  # (columns,depth)
    moments,  # (2,moment_tiles,rows) float32 of a, or None: a is normalised already
    sums,  # (columns,) float32, or None
    bias,  # (columns,)
    out,  # (rows,columns) a·weightᵀ + bias, or None
    activated,  # (rows,columns) its QuickGELU, or None
    statistics,  # (2,rows) float32 of a: mean and reciprocal standard deviation; or None
    rows,
    columns,
    depth,
    eps,
    moment_tiles,
    MOMENT_BLOCK: tl.constexpr,
    MOMENT_TILES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    column_tiles = tl.cdiv(columns, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M) * column_tiles, tl.num_programs(0)):
        row, column = tile // column_tiles * BLOCK_M, tile % column_tiles * BLOCK_N
        accumulator = _multiply(
            *(a, weight, row, column, rows, columns, depth),
            *(True, DESCRIPTORS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION),
        )
        if moments is not None:
            r = row + tl.arange(0, BLOCK_M)
            mean, rstd = _statistics(moments, r, rows, depth, moment_tiles, eps, MOMENT_BLOCK, MOMENT_TILES)
            if column == 0:
                tl.store(statistics + r, mean, mask=r < rows)
                tl.store(statistics + rows + r, rstd, mask=r < rows)
        for number in tl.static_range(PARTS):
            value = _part(accumulator, number, PARTS, BLOCK_M, BLOCK_N)
            start = column + number * WIDTH
            c = start + tl.arange(0, WIDTH)
            if moments is not None:
                total = tl.load(sums + c, mask=c < columns, other=0)
                value = (value - mean[:, None] * total[None, :]) * rstd[:, None]
            value += tl.load(bias + c, mask=c < columns, other=0).to(tl.float32)[None, :]
            if activated is not None:
                # Of the value as it is stored, so that backward differentiates at the same place.
                stored = value.to(a.dtype.element_ty if not DESCRIPTORS else a.dtype)
                value = stored.to(tl.float32)
                result = (value * quick_gelu_gate(value)).to(stored.dtype)
                _write(activated, result, row, start, rows, columns, DESCRIPTORS, BLOCK_M, WIDTH)
            if out is not None:
                stored = value.to(a.dtype.element_ty if not DESCRIPTORS else a.dtype)
                _write(out, stored, row, start, rows, columns, DESCRIPTORS, BLOCK_M, WIDTH)


@triton.jit
def _statistics(moments, r, rows, width, tiles, eps, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Mean and reciprocal standard deviation of rows from the moments of their parts of BLOCK columns."""
    t = tl.arange(0, TILES)
    count = tl.minimum(tl.maximum(width - t * BLOCK, 0), BLOCK).to(tl.float32)[:, None]
    known = (t < tiles)[:, None] & (r < rows)[None, :]
    offsets = t.to(tl.int64)[:, None] * rows + r[None, :]
    means = tl.load(moments + offsets, mask=known, other=0)
    squares = tl.load(moments + tl.cast(tiles, tl.int64) * rows + offsets, mask=known, other=0)
    mean = tl.sum(means * count, 0) / width
    centred = means - mean[None, :]
    return mean, 1 / tl.sqrt(tl.sum(squares + count * centred * centred, 0) / width + eps)


@triton.jit
def _add_linear_kernel(
    a,  # (rows,depth)
    weight,  # (columns,depth)
    bias,  # (columns,)
    residual,  # (rows,columns)
    out,  # (rows,columns): residual + a·weightᵀ + bias
    moments,  # (2,parts of all columns,rows) float32 of out: mean over a part, sum of squares about it
    rows,
    columns,
    depth,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    column_tiles = tl.cdiv(columns, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M) * column_tiles, tl.num_programs(0)):
        row, column = tile // column_tiles * BLOCK_M, tile % column_tiles * BLOCK_N
        accumulator = _multiply(
            *(a, weight, row, column, rows, columns, depth),
            *(True, DESCRIPTORS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION),
        )
        r = row + tl.arange(0, BLOCK_M)
        for number in tl.static_range(PARTS):
            value = _part(accumulator, number, PARTS, BLOCK_M, BLOCK_N)
            start = column + number * WIDTH
            c = start + tl.arange(0, WIDTH)
            value += tl.load(bias + c, mask=c < columns, other=0).to(tl.float32)[None, :]
            before = _read(residual, row, start, rows, columns, DESCRIPTORS, BLOCK_M, WIDTH)
            stored = (value + before.to(tl.float32)).to(before.dtype)
            _write(out, stored, row, start, rows, columns, DESCRIPTORS, BLOCK_M, WIDTH)
            # The moments are those of what is stored, so that backward finds the same x̂.
            value = tl.where((c < columns)[None, :], stored.to(tl.float32), 0.0)
            mean = tl.sum(value, 1) / tl.maximum(tl.minimum(columns - start, WIDTH), 1)
            centred = tl.where((c < columns)[None, :], value - mean[:, None], 0.0)
            target = moments + tl.cast(start // WIDTH, tl.int64) * rows + r
            mask = r < tl.where(start < columns, rows, 0)
            tl.store(target, mean, mask=mask)
            target += tl.cast(tl.cdiv(columns, WIDTH), tl.int64) * rows
            tl.store(target, tl.sum(centred * centred, 1), mask=mask)


@triton.jit
def _activation_backward_kernel(
    gradient,  # (rows,depth)
    weight,  # (depth,columns)
    hidden,  # (rows,columns) before QuickGELU
    sums,  # (columns,) float32, or None: no row sums
    bias,  # (columns,) float32, or None
    d_hidden,  # (rows,columns): gradient·weight ⊙ QuickGELU'(hidden)
    row_sums,  # (2,column tiles,rows) float32: Σ d·sums, Σ d·(hidden - bias) over a tile's columns; or None
    rows,
    columns,
    depth,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    column_tiles = tl.cdiv(columns, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M) * column_tiles, tl.num_programs(0)):
        row, column = tile // column_tiles * BLOCK_M, tile % column_tiles * BLOCK_N
        accumulator = _multiply(
            *(gradient, weight, row, column, rows, columns, depth),
            *(False, DESCRIPTORS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION),
        )
        first, second = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
        for number in tl.static_range(PARTS):
            start = column + number * WIDTH
            before = _read(hidden, row, start, rows, columns, DESCRIPTORS, BLOCK_M, WIDTH)
            value = before.to(tl.float32)
            gate = quick_gelu_gate(value)
            d = _part(accumulator, number, PARTS, BLOCK_M, BLOCK_N) * gate * (1 + 1.702 * value * (1 - gate))
            stored = d.to(before.dtype)
            _write(d_hidden, stored, row, start, rows, columns, DESCRIPTORS, BLOCK_M, WIDTH)
            if sums is not None:
                c = start + tl.arange(0, WIDTH)
                d = stored.to(tl.float32)
                first += tl.sum(d * tl.load(sums + c, mask=c < columns, other=0)[None, :], 1)
                second += tl.sum(d * (value - tl.load(bias + c, mask=c < columns, other=0)[None, :]), 1)
        if sums is not None:
            r = row + tl.arange(0, BLOCK_M)
            target = row_sums + tl.cast(tile % column_tiles, tl.int64) * rows + r
            tl.store(target, first, mask=r < rows)
            tl.store(target + tl.cast(column_tiles, tl.int64) * rows, second, mask=r < rows)


@triton.jit
def _norm_backward_kernel(
    d,  # (rows,depth)
    weight,  # (depth,columns): γ folded in
    row_sums,  # (2,sum_tiles,rows) float32: Σ d·sums, Σ d·(out - bias)
    statistics,  # (2,rows) float32 of x: mean and reciprocal standard deviation
    x,  # (rows,columns)
    residual,  # (rows,columns)
    d_x,  # (rows,columns): residual + LN'(d·weight)
    rows,
    columns,
    depth,
    sum_tiles,
    SUM_TILES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    column_tiles = tl.cdiv(columns, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M) * column_tiles, tl.num_programs(0)):
        row, column = tile // column_tiles * BLOCK_M, tile % column_tiles * BLOCK_N
        accumulator = _multiply(
            *(d, weight, row, column, rows, columns, depth),
            *(False, DESCRIPTORS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION),
        )
        r, t = row + tl.arange(0, BLOCK_M), tl.arange(0, SUM_TILES)
        offsets = t.to(tl.int64)[:, None] * rows + r[None, :]
        known = (t < sum_tiles)[:, None] & (r < rows)[None, :]
        average = tl.sum(tl.load(row_sums + offsets, mask=known, other=0), 0) / columns
        offsets += tl.cast(sum_tiles, tl.int64) * rows
        along = tl.sum(tl.load(row_sums + offsets, mask=known, other=0), 0) / columns
        mean = tl.load(statistics + r, mask=r < rows, other=0)
        rstd = tl.load(statistics + rows + r, mask=r < rows, other=0)
        along *= rstd
        for number in tl.static_range(PARTS):
            start = column + number * WIDTH
            centred = _read(x, row, start, rows, columns, DESCRIPTORS, BLOCK_M, WIDTH).to(tl.float32) - mean[:, None]
            value = _part(accumulator, number, PARTS, BLOCK_M, BLOCK_N)
            value = (value - average[:, None] - centred * along[:, None]) * rstd[:, None]
            before = _read(residual, row, start, rows, columns, DESCRIPTORS, BLOCK_M, WIDTH)
            stored = (value + before.to(tl.float32)).to(before.dtype)
            _write(d_x, stored, row, start, rows, columns, DESCRIPTORS, BLOCK_M, WIDTH)

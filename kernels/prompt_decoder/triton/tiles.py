"""Device functions of the decoder's kernels: tiles of contiguous matrices, their products, statistics of rows.

`rows` and `columns` are the indices of a tile, `inside` the mask of those that the matrix has: what lies outside reads
as 0 and is not written. `width` is the length of a whole row, which the tile's columns may be a part of.
"""

import triton
import triton.language as tl


@triton.jit
def place(tile, axis: tl.constexpr):
    """Number of the program along an axis: this one's, or what `tile` says, three numbers and the extents of all."""
    return tl.program_id(axis) if tile is None else tile[axis]


@triton.jit
def extent(tile, axis: tl.constexpr):
    """Programs along an axis."""
    return tl.num_programs(axis) if tile is None else tile[axis + 3]


@triton.jit
def load_tile(x, width, rows, columns, inside):
    return tl.load(x + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_transposed(x, width, rows, columns, inside):
    """Tile (columns, rows) of xᵀ; `inside` has its shape."""
    return tl.load(x + columns[:, None] + rows[None, :] * width, mask=inside, other=0.0)


@triton.jit
def store_tile(x, width, rows, columns, inside, value):
    tl.store(x + rows[:, None] * width + columns[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_vector(x, columns, size):
    """Elements of x (size,) as float32."""
    return tl.load(x + columns, mask=columns < size, other=0.0).to(tl.float32)


@triton.jit
def dot(left, right, sums):
    """sums + left·right; a product of float32 is three of TF32."""
    return tl.dot(left, right, sums, input_precision="tf32x3")


@triton.jit
def load_weight(weight, inputs, outputs, k, columns, INPUT_FIRST: tl.constexpr):
    """Tile (k, columns) of weightᵀ for a weight (outputs,inputs), of the weight itself for one (inputs,outputs)."""
    inside = (k < inputs)[:, None] & (columns < outputs)[None, :]
    if INPUT_FIRST:
        tile = load_tile(weight, outputs, k, columns, inside)
    else:
        tile = load_transposed(weight, inputs, columns, k, inside)
    return tile


@triton.jit
def add_product(
    sums,
    x,  # rows of `width`
    width,
    rows,
    rows_in,
    weight,  # (outputs,inputs), or (inputs,outputs) with INPUT_FIRST
    inputs,
    outputs,
    columns,
    INPUT_FIRST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sums + x·weightᵀ, of the first `inputs` columns of x."""
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = load_tile(x, width, rows, k, rows_in[:, None] & (k < inputs)[None, :]).to(weight.dtype.element_ty)
        sums = dot(left, load_weight(weight, inputs, outputs, k, columns, INPUT_FIRST), sums)
    return sums


@triton.jit
def add_three_products(
    sums_0,
    sums_1,
    sums_2,
    x,  # (C,H)
    rows,
    rows_in,
    weight,  # (3H,H)
    hidden,
    columns,
    BLOCK_K: tl.constexpr,
):
    """Each of the sums + x·weightᵀ with one third of the weight."""
    second = weight + hidden * hidden
    third = second + hidden * hidden
    for start in range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = load_tile(x, hidden, rows, k, rows_in[:, None] & (k < hidden)[None, :]).to(weight.dtype.element_ty)
        sums_0 = dot(left, load_weight(weight, hidden, hidden, k, columns, False), sums_0)
        sums_1 = dot(left, load_weight(second, hidden, hidden, k, columns, False), sums_1)
        sums_2 = dot(left, load_weight(third, hidden, hidden, k, columns, False), sums_2)
    return sums_0, sums_1, sums_2


@triton.jit
def row_statistics(x, width, rows, rows_in, EPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and 1/√(variance + EPS) of rows of x, in one pass over differences from the row's first element."""
    origin = tl.load(x + rows * width, mask=rows_in, other=0.0)
    sums = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        part = load_tile(x, width, rows, k, rows_in[:, None] & (k < width)[None, :])
        part = tl.where((k < width)[None, :], part - origin[:, None], 0.0)
        sums += part
        squares += part * part
    mean = tl.sum(sums, 1) / width
    variance = tl.maximum(tl.sum(squares, 1) / width - mean * mean, 0.0)
    return origin + mean, tl.rsqrt(variance + EPS)

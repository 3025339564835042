"""The steps of the folded prompt decoder as Triton kernels, all decoders in each launch; exact in real arithmetic.

A step is a chain of products that each wait for the one before and have C rows only. Seven launches a step forward and
seven back: everything between two products is part of one of them. LayerNorm is formed while the rows are read, gates,
softmax and their derivatives before they are written. Products take the compute dtype and add up in float32, as all the
rest is computed. Every value is written by one program, so that results do not vary from run to run.

Around the loop, and for the gradients of the weights, `eager.py` is used as it is, and so are its names. Step i makes
of h_{i−1} (state) and summed_{i−1}: gates; inner, what the GRU cell returns; qkv; attended; first and second, what the
two LayerNorms read; h_i; rows, the scores of the images; mixed, their softmax; summed_i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import configuration, launch, pin
from ...primitives import tanh
from .. import eager
from ..eager import EPS, Flow, Kept, Known, Loop, Steps, empty_kept, empty_outputs
from ..reference import Decoder

# BLOCK_C: rows, BLOCK: columns, BLOCK_K: inputs at a time. Products of float32 are three, with more registers.
pin("decoder_gru", sm_80={"BLOCK_C": 32, "BLOCK": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3})
pin("decoder_gru_fp32", sm_80={"BLOCK_C": 32, "BLOCK": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3})
pin(
    "decoder_linear",
    sm_80={"BLOCK_C": 32, "BLOCK": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    sm_90={"BLOCK_C": 32, "BLOCK": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
)
pin(
    "decoder_linear_fp32",
    sm_80={"BLOCK_C": 32, "BLOCK": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    sm_100={"BLOCK_C": 32, "BLOCK": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
)
pin("decoder_images", sm_80={"BLOCK_C": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3})
pin("decoder_images_fp32", sm_80={"BLOCK_C": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3})
pin("decoder_attention", sm_80={"BLOCK": 32, "num_warps": 4, "num_stages": 2})
pin("decoder_attention_fp32", sm_80={"BLOCK": 16, "num_warps": 4, "num_stages": 2})


def decode(
    decoders: Sequence[Decoder], class_features: Tensor, context: Tensor, *, prompt_length: int, heads: int
) -> Tensor:
    """Outputs o_1…o_n of G decoders; arguments and result as `op.decode`. The result can be differentiated once."""
    steps = Steps(forward_steps, backward_steps)
    return eager.decode(decoders, class_features, context, prompt_length=prompt_length, heads=heads, steps=steps)


def forward_steps(loop: Loop, n: int, heads: int, keep: bool) -> tuple[Tensor, Kept | None]:
    """Outputs (G,n,C,H), and what every step leaves for backward."""
    (count, classes, _), hidden = loop.start.shape, loop.out.shape[-1]
    images = loop.query.shape[1] // heads
    outputs = empty_outputs(loop, n)
    kept = empty_kept(loop, n if keep else 1, outputs)
    attended, mixed = (loop.start.new_empty(count, classes, width) for width in (hidden, loop.query.shape[1]))
    inner, state = torch.empty_like(kept.first[:, 0]), torch.empty_like(kept.first[:, 0])
    options = _options("decoder_gru", loop.start)
    images_options = _options("decoder_images", loop.start)
    for i in range(n):
        gates, qkv, first, second, rows = (part[:, i if keep else 0] for part in kept[:5])
        launch(
            _gru_kernel,
            _grid(options, classes, hidden, count),
            *(*_rows(loop.start if i == 0 else outputs[:, i - 1]), *_rows(state)),
            *(*_rows(loop.feedback), loop.feedback_bias, *_rows(loop.recurrent), loop.recurrent_bias),
            *(*_rows(gates), *_rows(inner), classes, hidden),
            FIRST=i == 0,
            KEEP=keep,
            **options,
        )
        _linear(inner, loop.qkv, qkv, bias=loop.qkv_bias)
        _attend(qkv, heads, attended)
        _linear(attended, loop.out, first, bias=loop.out_bias, residual=inner)
        _linear(first, loop.y, second, bias=loop.y_bias, residual=inner, normalise=True)
        launch(
            _images_kernel,
            (triton.cdiv(classes, images_options["BLOCK_C"]), heads, count),
            *(*_rows(second), loop.scale, loop.shift, *_rows(loop.query), loop.query_bias),
            *(*_rows(state), *_rows(rows), *_rows(mixed), classes, images, hidden),
            KEEP=keep,
            EPS=EPS,
            BLOCK=_block(images),
            **images_options,
        )
        _linear(mixed, loop.value, outputs[:, i], residual=state, input_first=True)
    return outputs, kept if keep else None


def backward_steps(loop: Loop, kept: Kept, known: Known, gradient: Tensor, heads: int) -> Flow:
    """Back over the steps: what each needs of the one after."""
    (count, n, classes, hidden), dtype = kept.first.shape, kept.qkv.dtype
    images = loop.query.shape[1] // heads
    attended = kept.qkv.new_empty(count, n, classes, hidden)
    logarithms = loop.scale.new_empty(count, n, heads, classes)
    _attend(kept.qkv.flatten(0, 1), heads, attended.flatten(0, 1), logarithms.flatten(0, 1))

    if gradient.stride(-1) != 1:
        gradient = gradient.contiguous()
    d_outputs = torch.empty_like(kept.summed)
    d_outputs[:, -1] = gradient[:, -1]
    d_gates, d_qkv, d_first, d_second, d_rows = (torch.empty_like(part, dtype=dtype) for part in kept[:5])
    d_h = torch.empty_like(kept.second)
    d_state = torch.zeros_like(kept.first[:, 0])
    d_normal, residual_1, residual_2, carry = (torch.empty_like(d_state) for _ in range(4))
    d_attended = torch.empty_like(attended[:, 0])
    options = _options("decoder_linear", loop.start)
    images_options = _options("decoder_images", loop.start)
    attention_options = _attention_options(loop.start, hidden // heads)
    blocks = triton.cdiv(classes, attention_options["BLOCK"])
    grid = _grid(options, classes, hidden, count)
    for i in reversed(range(n)):
        launch(
            _images_backward_kernel,
            (triton.cdiv(classes, images_options["BLOCK_C"]), heads, count),
            *(*_rows(d_outputs[:, i]), *_rows(loop.value), *_rows(known.weights[:, i])),
            *(*_rows(d_rows[:, i]), classes, images, hidden),
            BLOCK=_block(images),
            **images_options,
        )
        _linear(d_rows[:, i], loop.query, d_h[:, i], residual=d_state, other=d_outputs[:, i], input_first=True)
        for d_normal_part, scale, x, statistics, weight, d_x, exact, d_input in (
            (d_h[:, i], loop.scale, kept.second, (known.mean_2, known.rstd_2), loop.y, d_second, residual_2, d_normal),
            (d_normal, None, kept.first, (known.mean_1, known.rstd_1), loop.out, d_first, residual_1, d_attended),
        ):
            launch(
                _norm_backward_kernel,
                grid,
                *(*_rows(d_normal_part), scale, *_rows(x[:, i]), *(part[i] for part in statistics)),
                *(*_rows(weight), *_rows(d_x[:, i]), *_rows(exact), *_rows(d_input), classes, hidden),
                **options,
            )
        launch(
            _attention_backward_kernel,
            (2 * blocks, heads, count),
            *(*_rows(kept.qkv[:, i]), *_rows(attended[:, i]), *_rows(logarithms[:, i]), *_rows(d_attended)),
            *(*_rows(d_qkv[:, i]), classes, hidden, (hidden // heads) ** -0.5),
            WIDTH=hidden // heads,
            BLOCK_D=_block(hidden // heads),
            **attention_options,
        )
        launch(
            _gru_backward_kernel,
            grid,
            *(*_rows(d_qkv[:, i]), *_rows(loop.qkv), *_rows(residual_1), *_rows(residual_2)),
            *(*_rows(kept.gates[:, i]), *_rows(known.h[:, i]), *_rows(d_gates[:, i]), *_rows(carry), classes, hidden),
            **options,
        )
        if i > 0:
            launch(
                _step_backward_kernel,
                _grid(options, classes, hidden, 2 * count),
                *(*_rows(d_gates[:, i]), *_rows(loop.recurrent), *_rows(loop.feedback)),
                *(*_rows(carry), *_rows(gradient[:, i - 1]), *_rows(d_state), *_rows(d_outputs[:, i - 1])),
                *(classes, hidden),
                **options,
            )
    return Flow(d_outputs, d_gates, d_qkv, d_first, d_second, d_rows, d_outputs, d_h, (None, None), attended)


def _linear(
    x: Tensor,
    weight: Tensor,
    output: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    other: Tensor | None = None,
    normalise: bool = False,
    input_first: bool = False,
) -> None:
    """output (G,C,O) = residual + other + bias + x (G,C,I) · weightᵀ; weight (G,O,I), or (G,I,O) with `input_first`."""
    (count, classes, inputs), columns = x.shape, output.shape[-1]
    options = _options("decoder_linear", weight)
    launch(
        _linear_kernel,
        _grid(options, classes, columns, count),
        *(*_rows(x), *_rows(weight), bias, *_rows(residual), *_rows(other), *_rows(output)),
        *(classes, inputs, columns),
        NORMALISE=normalise,
        INPUT_FIRST=input_first,
        EPS=EPS,
        **options,
    )


def _attend(qkv: Tensor, heads: int, attended: Tensor, logarithms: Tensor | None = None) -> None:
    """Self-attention of (A,C,3H) into (A,C,H), and the logarithms of the sums that softmax divides by, (A,heads,C)."""
    count, classes, hidden = attended.shape
    options = _attention_options(qkv, hidden // heads)
    launch(
        _attention_kernel,
        (triton.cdiv(classes, options["BLOCK"]), heads, count),
        *(*_rows(qkv), *_rows(attended), *_rows(logarithms), classes, hidden, (hidden // heads) ** -0.5),
        WIDTH=hidden // heads,
        BLOCK_D=_block(hidden // heads),
        **options,
    )


def _rows(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A (G,R,I) argument: the tensor and its distances between decoders and between rows."""
    if tensor is None:
        return None, 0, 0
    assert tensor.stride(-1) == 1
    return tensor, tensor.stride(0), tensor.stride(1)


def _options(kernel: str, weight: Tensor) -> dict[str, int]:
    return configuration(f"{kernel}_fp32" if weight.dtype == torch.float32 else kernel, weight.device)


def _attention_options(qkv: Tensor, width: int) -> dict[str, int]:
    options = _options("decoder_attention", qkv)
    return {**options, "num_warps": 8} if width > 64 else options  # for the registers


def _grid(options: dict[str, int], classes: int, columns: int, count: int) -> tuple[int, int, int]:
    return triton.cdiv(columns, options["BLOCK"]), triton.cdiv(classes, options["BLOCK_C"]), count


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


# Below, a matrix of R rows is given by a pointer, the distance between decoders (`_g`) and the distance between rows
# (`_r`). Tiles are masked where they leave the matrix.


@triton.jit
def _tile(x, x_r, rows, rows_in, columns, columns_in):
    at = rows[:, None] * x_r + columns[None, :]
    return tl.load(x + at, mask=rows_in[:, None] & columns_in[None, :], other=0.0)


@triton.jit
def _put(x, x_r, rows, rows_in, columns, columns_in, value):
    at = rows[:, None] * x_r + columns[None, :]
    tl.store(x + at, value.to(x.dtype.element_ty), mask=rows_in[:, None] & columns_in[None, :])


@triton.jit
def _vector(x, columns, columns_in):
    return tl.load(x + columns, mask=columns_in, other=0.0).to(tl.float32)


@triton.jit
def _dot(left, right, sums):
    return tl.dot(left, right, sums, input_precision="tf32x3")


@triton.jit
def _weights(weight, weight_r, columns, columns_in, k, k_in, INPUT_FIRST: tl.constexpr):
    """Tile (k, columns) of weightᵀ where the weight is (columns, k), of the weight itself where its input is first."""
    at = k[:, None] * weight_r + columns[None, :] if INPUT_FIRST else k[:, None] + columns[None, :] * weight_r
    return tl.load(weight + at, mask=k_in[:, None] & columns_in[None, :], other=0.0)


@triton.jit
def _product(
    sums,
    x,
    x_r,
    rows,
    rows_in,
    weight,
    weight_r,
    columns,
    columns_in,
    inputs,
    INPUT_FIRST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sums + x · weightᵀ"""
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = _tile(x, x_r, rows, rows_in, k, k < inputs).to(weight.dtype.element_ty)
        sums = _dot(left, _weights(weight, weight_r, columns, columns_in, k, k < inputs, INPUT_FIRST), sums)
    return sums


@triton.jit
def _statistics(x, x_r, rows, rows_in, hidden, EPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and 1/√(variance + ε) of rows, in one pass over differences from the row's first element."""
    origin = tl.load(x + rows * x_r, mask=rows_in, other=0.0)
    sums = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    for start in range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        part = _tile(x, x_r, rows, rows_in, k, k < hidden)
        part = tl.where((k < hidden)[None, :], part - origin[:, None], 0.0)
        sums += part
        squares += part * part
    mean = tl.sum(sums, 1) / hidden
    variance = tl.maximum(tl.sum(squares, 1) / hidden - mean * mean, 0.0)
    return origin + mean, tl.rsqrt(variance + EPS)


@triton.jit
def _three_products(
    sums_0,
    sums_1,
    sums_2,
    x,
    x_r,
    rows,
    rows_in,
    weight,
    weight_r,
    columns,
    columns_in,
    hidden,
    BLOCK_K: tl.constexpr,
):
    """Of the same rows with the three parts of a weight (3H,H)."""
    second = weight + hidden * weight_r
    third = second + hidden * weight_r
    for start in range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = _tile(x, x_r, rows, rows_in, k, k < hidden).to(weight.dtype.element_ty)
        sums_0 = _dot(left, _weights(weight, weight_r, columns, columns_in, k, k < hidden, False), sums_0)
        sums_1 = _dot(left, _weights(second, weight_r, columns, columns_in, k, k < hidden, False), sums_1)
        sums_2 = _dot(left, _weights(third, weight_r, columns, columns_in, k, k < hidden, False), sums_2)
    return sums_0, sums_1, sums_2


@triton.jit
def _gru_kernel(
    x,  # (G,C,3H) start in the first step, afterwards (G,C,H) summed
    x_g,
    x_r,
    state,  # (G,C,H) h_{i−1}; not read in the first step
    state_g,
    state_r,
    feedback,  # (G,3H,H) to r, z, n
    feedback_g,
    feedback_r,
    feedback_bias,
    recurrent,  # (G,3H,H) to u, r, z
    recurrent_g,
    recurrent_r,
    recurrent_bias,
    gates,  # (G,C,4H)
    gates_g,
    gates_r,
    inner,  # (G,C,H)
    inner_g,
    inner_r,
    classes,
    hidden,
    FIRST: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The GRU cell: gates u, r, z, n where they are kept, and n + z⊙(h − n)."""
    g = tl.program_id(2).to(tl.int64)
    rows, columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows_in, columns_in = rows < classes, columns < hidden
    x += g * x_g
    state += g * state_g
    recurrent_bias += g * 3 * hidden
    if FIRST:
        r = _tile(x, x_r, rows, rows_in, columns, columns_in).to(tl.float32)
        z = _tile(x + hidden, x_r, rows, rows_in, columns, columns_in).to(tl.float32)
        n = _tile(x + 2 * hidden, x_r, rows, rows_in, columns, columns_in).to(tl.float32)
        u = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    else:
        zeros = tl.zeros((BLOCK_C, BLOCK), tl.float32)
        weight = feedback + g * feedback_g
        r, z, n = _three_products(
            zeros, zeros, zeros, x, x_r, rows, rows_in, weight, feedback_r, columns, columns_in, hidden, BLOCK_K
        )
        weight = recurrent + g * recurrent_g
        u, r, z = _three_products(
            zeros, r, z, state, state_r, rows, rows_in, weight, recurrent_r, columns, columns_in, hidden, BLOCK_K
        )
        feedback_bias += g * 3 * hidden
        r += _vector(feedback_bias, columns, columns_in)[None, :]
        z += _vector(feedback_bias + hidden, columns, columns_in)[None, :]
        n += _vector(feedback_bias + 2 * hidden, columns, columns_in)[None, :]
    u += _vector(recurrent_bias, columns, columns_in)[None, :]
    r = tl.sigmoid(r + _vector(recurrent_bias + hidden, columns, columns_in)[None, :])
    z = tl.sigmoid(z + _vector(recurrent_bias + 2 * hidden, columns, columns_in)[None, :])
    n = tanh(n + r * u)
    value = n - z * n if FIRST else n + z * (_tile(state, state_r, rows, rows_in, columns, columns_in) - n)
    if KEEP:
        gates += g * gates_g
        _put(gates, gates_r, rows, rows_in, columns, columns_in, u)
        _put(gates + hidden, gates_r, rows, rows_in, columns, columns_in, r)
        _put(gates + 2 * hidden, gates_r, rows, rows_in, columns, columns_in, z)
        _put(gates + 3 * hidden, gates_r, rows, rows_in, columns, columns_in, n)
    _put(inner + g * inner_g, inner_r, rows, rows_in, columns, columns_in, value)


@triton.jit
def _linear_kernel(
    x,  # (G,C,I)
    x_g,
    x_r,
    weight,  # (G,O,I), or (G,I,O) with INPUT_FIRST
    weight_g,
    weight_r,
    bias,  # (G,O) or None
    residual,  # (G,C,O) or None
    residual_g,
    residual_r,
    other,  # (G,C,O) or None
    other_g,
    other_r,
    output,  # (G,C,O)
    output_g,
    output_r,
    classes,
    inputs,
    columns_number,
    NORMALISE: tl.constexpr,
    INPUT_FIRST: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """residual + other + bias + x·weightᵀ, where wanted of LayerNorm(x) without scale and shift."""
    g = tl.program_id(2).to(tl.int64)
    rows, columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows_in, columns_in = rows < classes, columns < columns_number
    x += g * x_g
    weight += g * weight_g
    sums = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    if NORMALISE:
        mean, rstd = _statistics(x, x_r, rows, rows_in, inputs, EPS, BLOCK_C, BLOCK_K)
        for start in range(0, inputs, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            left = (_tile(x, x_r, rows, rows_in, k, k < inputs) - mean[:, None]) * rstd[:, None]
            right = _weights(weight, weight_r, columns, columns_in, k, k < inputs, INPUT_FIRST)
            sums = _dot(left.to(weight.dtype.element_ty), right, sums)
    else:
        sums = _product(
            sums, x, x_r, rows, rows_in, weight, weight_r, columns, columns_in, inputs, INPUT_FIRST, BLOCK_K
        )
    if bias is not None:
        sums += _vector(bias + g * columns_number, columns, columns_in)[None, :]
    if residual is not None:
        sums += _tile(residual + g * residual_g, residual_r, rows, rows_in, columns, columns_in).to(tl.float32)
    if other is not None:
        sums += _tile(other + g * other_g, other_r, rows, rows_in, columns, columns_in).to(tl.float32)
    _put(output + g * output_g, output_r, rows, rows_in, columns, columns_in, sums)


@triton.jit
def _attention_kernel(
    qkv,  # (A,C,3H)
    qkv_g,
    qkv_r,
    attended,  # (A,C,H)
    attended_g,
    attended_r,
    logarithms,  # (A,heads,C) or None
    logarithms_g,
    logarithms_r,
    classes,
    hidden,
    factor,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Self-attention of a block of queries in one head, over blocks of keys with a running maximum."""
    a, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    rows_in, d_in = rows < classes, d < WIDTH
    qkv += a * qkv_g + head * WIDTH
    q = _tile(qkv, qkv_r, rows, rows_in, d, d_in)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, classes, BLOCK):
        others = start + tl.arange(0, BLOCK)
        others_in = others < classes
        k = _weights(qkv + hidden, qkv_r, others, others_in, d, d_in, False)
        v = _tile(qkv + 2 * hidden, qkv_r, others, others_in, d, d_in)
        scores = _dot(q, k, tl.zeros((BLOCK, BLOCK), tl.float32)) * factor
        scores = tl.where(others_in[None, :], scores, float("-inf"))
        before, highest = highest, tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp(before - highest)
        weights = tl.exp(scores - highest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        sums = _dot(weights.to(v.dtype), v, sums * shrink[:, None])
    _put(attended + a * attended_g + head * WIDTH, attended_r, rows, rows_in, d, d_in, sums / total[:, None])
    if logarithms is not None:
        tl.store(logarithms + a * logarithms_g + head * logarithms_r + rows, highest + tl.log(total), mask=rows_in)


@triton.jit
def _images_kernel(
    second,  # (G,C,H)
    second_g,
    second_r,
    scale,  # (G,H)
    shift,
    query,  # (G,heads·B,H)
    query_g,
    query_r,
    query_bias,  # (G,heads·B)
    state,  # (G,C,H) h_i
    state_g,
    state_r,
    scores,  # (G,C,heads·B)
    scores_g,
    scores_r,
    mixed,  # (G,C,heads·B)
    mixed_g,
    mixed_r,
    classes,
    images,
    hidden,
    KEEP: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h_i = LayerNorm(second), its scores of the images in one head, where they are kept, and their softmax."""
    g, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows, columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK)
    rows_in, columns_in = rows < classes, columns < images
    second += g * second_g
    scale += g * hidden
    shift += g * hidden
    state += g * state_g
    query += g * query_g + head * images * query_r
    mean, rstd = _statistics(second, second_r, rows, rows_in, hidden, EPS, BLOCK_C, BLOCK_K)
    sums = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    for start in range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_in = k < hidden
        h = (_tile(second, second_r, rows, rows_in, k, k_in) - mean[:, None]) * rstd[:, None]
        h = h * _vector(scale, k, k_in)[None, :] + _vector(shift, k, k_in)[None, :]
        # The programs of the heads take turns.
        mine = k // BLOCK_K % tl.num_programs(1) == head
        _put(state, state_r, rows, rows_in, k, k_in & mine, h)
        right = _weights(query, query_r, columns, columns_in, k, k_in, False)
        sums = _dot(h.to(query.dtype.element_ty), right, sums)
    sums += _vector(query_bias + (g * tl.num_programs(1) + head) * images, columns, columns_in)[None, :]
    sums = sums.to(scores.dtype.element_ty)  # backward has the rounded ones
    if KEEP:
        _put(scores + g * scores_g + head * images, scores_r, rows, rows_in, columns, columns_in, sums)
    sums = tl.where(columns_in[None, :], sums.to(tl.float32), float("-inf"))
    weights = tl.exp(sums - tl.max(sums, 1)[:, None])
    weights = weights / tl.sum(weights, 1)[:, None]
    _put(mixed + g * mixed_g + head * images, mixed_r, rows, rows_in, columns, columns_in, weights)


@triton.jit
def _images_backward_kernel(
    d_summed,  # (G,C,H)
    d_summed_g,
    d_summed_r,
    value,  # (G,heads·B,H)
    value_g,
    value_r,
    weights,  # (G,C,heads·B) the softmax
    weights_g,
    weights_r,
    d_scores,  # (G,C,heads·B)
    d_scores_g,
    d_scores_r,
    classes,
    images,
    hidden,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of the scores of the images in one head."""
    g, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows, columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK)
    rows_in, columns_in = rows < classes, columns < images
    d_summed += g * d_summed_g
    value += g * value_g + head * images * value_r
    sums = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    sums = _product(
        sums, d_summed, d_summed_r, rows, rows_in, value, value_r, columns, columns_in, hidden, False, BLOCK_K
    )
    p = _tile(weights + g * weights_g + head * images, weights_r, rows, rows_in, columns, columns_in)
    sums = p * (sums - tl.sum(p * sums, 1)[:, None])
    _put(d_scores + g * d_scores_g + head * images, d_scores_r, rows, rows_in, columns, columns_in, sums)


@triton.jit
def _norm_backward_kernel(
    gradient,  # (G,C,H) of LayerNorm(x), before `scale`
    gradient_g,
    gradient_r,
    scale,  # (G,H) or None
    x,  # (G,C,H)
    x_g,
    x_r,
    mean,  # (G,C,1)
    rstd,
    weight,  # (G,H,H)
    weight_g,
    weight_r,
    d_x,  # (G,C,H), of which a weight's gradient is made
    d_x_g,
    d_x_r,
    exact,  # (G,C,H) the same in float32
    exact_g,
    exact_r,
    output,  # (G,C,H)
    output_g,
    output_r,
    classes,
    hidden,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Back through LayerNorm and the linear layer under it, x = … + input·weightᵀ: gradients of x and of the input."""
    g = tl.program_id(2).to(tl.int64)
    rows, columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows_in, columns_in = rows < classes, columns < hidden
    gradient += g * gradient_g
    if scale is not None:
        scale += g * hidden
    x += g * x_g
    weight += g * weight_g
    d_x += g * d_x_g
    exact += g * exact_g
    mean = tl.load(mean + g * classes + rows, mask=rows_in, other=0.0)
    rstd = tl.load(rstd + g * classes + rows, mask=rows_in, other=0.0)

    # d = gradient⊙scale: x̄ = rstd·(d − Σd/H − x̂·Σ(d⊙x̂)/H).
    parts = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    along = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    for start in range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        d = _tile(gradient, gradient_r, rows, rows_in, k, k < hidden)
        if scale is not None:
            d *= _vector(scale, k, k < hidden)[None, :]
        parts += d
        along += d * (_tile(x, x_r, rows, rows_in, k, k < hidden) - mean[:, None])
    part = tl.sum(parts, 1) / hidden
    slope = tl.sum(along, 1) * rstd * rstd / hidden
    sums = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    for start in range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_in = k < hidden
        d = _tile(gradient, gradient_r, rows, rows_in, k, k_in)
        if scale is not None:
            d *= _vector(scale, k, k_in)[None, :]
        centred = _tile(x, x_r, rows, rows_in, k, k_in) - mean[:, None]
        d = rstd[:, None] * (d - part[:, None] - centred * slope[:, None])
        # The programs of a row take turns.
        mine = k // BLOCK_K % tl.num_programs(0) == tl.program_id(0)
        _put(exact, exact_r, rows, rows_in, k, k_in & mine, d)
        _put(d_x, d_x_r, rows, rows_in, k, k_in & mine, d)
        right = _weights(weight, weight_r, columns, columns_in, k, k_in, True)
        sums = _dot(d.to(weight.dtype.element_ty), right, sums)
    _put(output + g * output_g, output_r, rows, rows_in, columns, columns_in, sums)


@triton.jit
def _attention_backward_kernel(
    qkv,  # (G,C,3H)
    qkv_g,
    qkv_r,
    attended,  # (G,C,H)
    attended_g,
    attended_r,
    logarithms,  # (G,heads,C)
    logarithms_g,
    logarithms_r,
    gradient,  # (G,C,H) of attended
    gradient_g,
    gradient_r,
    d_qkv,  # (G,C,3H)
    d_qkv_g,
    d_qkv_r,
    classes,
    hidden,
    factor,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients in one head of a block of queries or, in the second half of the programs, of keys and values.

    Of a score between query i and key j: p_ij·(ō_i·v_j − ō_i·o_i), with o the result and ō its gradient.
    """
    g, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    blocks = tl.num_programs(0) // 2
    rows, d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    rows_in, d_in = rows < classes, d < WIDTH
    qkv += g * qkv_g + head * WIDTH
    attended += g * attended_g + head * WIDTH
    gradient += g * gradient_g + head * WIDTH
    logarithms += g * logarithms_g + head * logarithms_r
    d_qkv += g * d_qkv_g + head * WIDTH
    zeros = tl.zeros((BLOCK, BLOCK), tl.float32)
    if tl.program_id(0) < blocks:
        q = _tile(qkv, qkv_r, rows, rows_in, d, d_in)
        d_o = _tile(gradient, gradient_r, rows, rows_in, d, d_in)
        o = _tile(attended, attended_r, rows, rows_in, d, d_in)
        level = tl.sum(d_o.to(tl.float32) * o.to(tl.float32), 1)
        logarithm = tl.load(logarithms + rows, mask=rows_in, other=0.0)
        d_q = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for start in range(0, classes, BLOCK):
            others = start + tl.arange(0, BLOCK)
            others_in = others < classes
            k = _tile(qkv + hidden, qkv_r, others, others_in, d, d_in)
            v = _tile(qkv + 2 * hidden, qkv_r, others, others_in, d, d_in)
            p = tl.exp(_dot(q, tl.trans(k), zeros) * factor - logarithm[:, None])
            p = tl.where(others_in[None, :], p, 0.0)
            d_scores = p * (_dot(d_o, tl.trans(v), zeros) - level[:, None])
            d_q = _dot(d_scores.to(k.dtype), k, d_q)
        _put(d_qkv, d_qkv_r, rows, rows_in, d, d_in, d_q * factor)
    else:
        k = _tile(qkv + hidden, qkv_r, rows, rows_in, d, d_in)
        v = _tile(qkv + 2 * hidden, qkv_r, rows, rows_in, d, d_in)
        d_k = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        d_v = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for start in range(0, classes, BLOCK):
            others = start + tl.arange(0, BLOCK)
            others_in = others < classes
            q = _tile(qkv, qkv_r, others, others_in, d, d_in)
            d_o = _tile(gradient, gradient_r, others, others_in, d, d_in)
            o = _tile(attended, attended_r, others, others_in, d, d_in)
            level = tl.sum(d_o.to(tl.float32) * o.to(tl.float32), 1)
            logarithm = tl.load(logarithms + others, mask=others_in, other=0.0)
            p = tl.exp(_dot(k, tl.trans(q), zeros) * factor - logarithm[None, :])
            p = tl.where(others_in[None, :], p, 0.0)
            d_scores = p * (_dot(v, tl.trans(d_o), zeros) - level[None, :])
            d_v = _dot(p.to(d_o.dtype), d_o, d_v)
            d_k = _dot(d_scores.to(q.dtype), q, d_k)
        _put(d_qkv + hidden, d_qkv_r, rows, rows_in, d, d_in, d_k * factor)
        _put(d_qkv + 2 * hidden, d_qkv_r, rows, rows_in, d, d_in, d_v)


@triton.jit
def _gru_backward_kernel(
    d_qkv,  # (G,C,3H)
    d_qkv_g,
    d_qkv_r,
    weight,  # (G,3H,H)
    weight_g,
    weight_r,
    residual,  # (G,C,H) what else is added to the gradient of inner
    residual_g,
    residual_r,
    other,
    other_g,
    other_r,
    gates,  # (G,C,4H)
    gates_g,
    gates_r,
    state,  # (G,C,H) h_{i−1}
    state_g,
    state_r,
    d_gates,  # (G,C,4H)
    d_gates_g,
    d_gates_r,
    carry,  # (G,C,H) part of the gradient of h_{i−1}
    carry_g,
    carry_r,
    classes,
    hidden,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Back through the projection to q, k, v and through the GRU cell."""
    g = tl.program_id(2).to(tl.int64)
    rows, columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows_in, columns_in = rows < classes, columns < hidden
    d_qkv += g * d_qkv_g
    weight += g * weight_g
    d_inner = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    d_inner = _product(
        d_inner, d_qkv, d_qkv_r, rows, rows_in, weight, weight_r, columns, columns_in, 3 * hidden, True, BLOCK_K
    )
    d_inner += _tile(residual + g * residual_g, residual_r, rows, rows_in, columns, columns_in)
    d_inner += _tile(other + g * other_g, other_r, rows, rows_in, columns, columns_in)
    gates += g * gates_g
    u = _tile(gates, gates_r, rows, rows_in, columns, columns_in)
    r = _tile(gates + hidden, gates_r, rows, rows_in, columns, columns_in)
    z = _tile(gates + 2 * hidden, gates_r, rows, rows_in, columns, columns_in)
    n = _tile(gates + 3 * hidden, gates_r, rows, rows_in, columns, columns_in)
    h = _tile(state + g * state_g, state_r, rows, rows_in, columns, columns_in)
    d_n = d_inner * (1 - z) * (1 - n * n)
    d_u = d_n * r
    d_gates += g * d_gates_g
    _put(d_gates, d_gates_r, rows, rows_in, columns, columns_in, d_u)
    _put(d_gates + hidden, d_gates_r, rows, rows_in, columns, columns_in, d_u * (1 - r) * u)
    _put(d_gates + 2 * hidden, d_gates_r, rows, rows_in, columns, columns_in, d_inner * (h - n) * (1 - z) * z)
    _put(d_gates + 3 * hidden, d_gates_r, rows, rows_in, columns, columns_in, d_n)
    _put(carry + g * carry_g, carry_r, rows, rows_in, columns, columns_in, d_inner * z)


@triton.jit
def _step_backward_kernel(
    d_gates,  # (G,C,4H)
    d_gates_g,
    d_gates_r,
    recurrent,  # (G,3H,H)
    recurrent_g,
    recurrent_r,
    feedback,  # (G,3H,H)
    feedback_g,
    feedback_r,
    carry,  # (G,C,H)
    carry_g,
    carry_r,
    gradient,  # (G,C,H) of the output before, from outside
    gradient_g,
    gradient_r,
    d_state,  # (G,C,H)
    d_state_g,
    d_state_r,
    d_output,  # (G,C,H)
    d_output_g,
    d_output_r,
    classes,
    hidden,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradients of h_{i−1}, in the first half of the programs, and of what is fed back, in the second."""
    count = tl.num_programs(2) // 2
    g = (tl.program_id(2) % count).to(tl.int64)
    rows, columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows_in, columns_in = rows < classes, columns < hidden
    d_gates += g * d_gates_g
    if tl.program_id(2) < count:
        weight = recurrent + g * recurrent_g
        sums = _tile(carry + g * carry_g, carry_r, rows, rows_in, columns, columns_in)
        sums = _product(
            sums, d_gates, d_gates_r, rows, rows_in, weight, recurrent_r, columns, columns_in, 3 * hidden, True, BLOCK_K
        )
        _put(d_state + g * d_state_g, d_state_r, rows, rows_in, columns, columns_in, sums)
    else:
        weight = feedback + g * feedback_g
        d_gates += hidden  # r, z, n
        sums = _tile(gradient + g * gradient_g, gradient_r, rows, rows_in, columns, columns_in).to(tl.float32)
        sums = _product(
            sums, d_gates, d_gates_r, rows, rows_in, weight, feedback_r, columns, columns_in, 3 * hidden, True, BLOCK_K
        )
        _put(d_output + g * d_output_g, d_output_r, rows, rows_in, columns, columns_in, sums)

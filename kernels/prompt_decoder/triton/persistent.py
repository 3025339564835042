"""All steps of the GRU prompt decoder in one launch: as many programs as run at once, which wait for one another.

A step has seven phases, each of which reads what all programs wrote in the one before. The programs share out the tiles
of a phase, then meet at a barrier in memory. The phases are the kernels of forward.py and backward.py, called with the
tile that a program stands for; arguments and letters are theirs. A kernel runs phases `first` to `last`: all in one
launch, or one a launch, without a barrier, which is how the interpreter proves that a phase needs no more than that the
one before has ended.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .backward import (
    cross_attention_backward_kernel,
    gru_backward_kernel,
    norm_linear_backward_kernel,
    recurrence_backward_kernel,
    self_attention_backward_kernel,
)
from .forward import cross_attention_kernel, gru_kernel, linear_kernel, self_attention_kernel

PHASES = 7
"""of a step, forward and backward"""


class Sizes(NamedTuple):
    """Sizes of a call."""

    decoders: int  # G
    steps: int  # n
    classes: int  # C
    images: int  # B
    hidden: int  # H
    heads: int


class ForwardBuffers(NamedTuple):
    """Values that live from one phase to a later one, and the outputs."""

    outputs: Tensor  # (G,n,C,H)
    inner: Tensor  # (G,C,H), as all that follow
    state: Tensor
    attended: Tensor
    mixed: Tensor  # (G,C,M)


class BackwardBuffers(NamedTuple):
    """Gradients that live from one phase to a later one, each (G,C,H), and the statistics of self-attention."""

    state: Tensor
    normed: Tensor
    residual_1: Tensor
    residual_2: Tensor
    carry: Tensor
    attended: Tensor
    lse: Tensor  # (G,n,heads,C)


@triton.jit
def meet(counter, arrivals):
    """Wait until `arrivals` programs have come; what they wrote before can be read after."""
    tl.debug_barrier()  # all threads of this program have written
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") + 1
    while arrived < arrivals:
        arrived = tl.load(counter, volatile=True)
    tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def tile_of(number, blocks, rows, count):
    """Place of a tile among (blocks, rows, count), and these."""
    return number % blocks, number // blocks % rows, number // blocks // rows, blocks, rows, count


# Calls, not inlined: what LLVM moves out of every tile's loop would be alive in all phases, too much for the registers.
gru = triton.jit(gru_kernel.fn, noinline=True)
linear = triton.jit(linear_kernel.fn, noinline=True)
self_attention = triton.jit(self_attention_kernel.fn, noinline=True)
cross_attention = triton.jit(cross_attention_kernel.fn, noinline=True)
cross_attention_backward = triton.jit(cross_attention_backward_kernel.fn, noinline=True)
gru_backward = triton.jit(gru_backward_kernel.fn, noinline=True)
norm_linear_backward = triton.jit(norm_linear_backward_kernel.fn, noinline=True)
recurrence_backward = triton.jit(recurrence_backward_kernel.fn, noinline=True)
self_attention_backward = triton.jit(self_attention_backward_kernel.fn, noinline=True)


@triton.jit
def forward_kernel(
    weights,  # StepWeights
    saved,  # SavedActivations, of one step where SAVE is false
    buffers,  # ForwardBuffers
    counter,  # (1,) zero
    first,
    last,
    sizes,  # Sizes
    factor,
    SAVE: tl.constexpr,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,  # of a head
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IMAGES_C: tl.constexpr,
    ATTENTION: tl.constexpr,
):
    """Phases of the steps forward: step i is phases 7i to 7i + 6."""
    count, classes, hidden = sizes.decoders, sizes.classes, sizes.hidden
    program, programs = tl.program_id(0), tl.num_programs(0)
    width = sizes.heads * sizes.images
    blocks, rows = tl.cdiv(hidden, BLOCK), tl.cdiv(classes, BLOCK_C)
    stack = classes * sizes.steps  # rows of a decoder
    kept = stack if SAVE else classes
    for phase in range(first, last):
        i, part = phase // 7, phase % 7
        step = classes * i
        here = step if SAVE else 0
        gates = saved.gates + here * 4 * hidden
        qkv = saved.qkv + here * 3 * hidden
        pre_norm_1 = saved.pre_norm_1 + here * hidden
        pre_norm_2 = saved.pre_norm_2 + here * hidden
        scores = saved.scores + here * width
        if part == 0:
            for number in range(program, blocks * rows * count, programs):
                tile = tile_of(number, blocks, rows, count)
                if i == 0:
                    gru(
                        weights.start, classes * 3 * hidden, buffers.state, weights.feedback, weights.feedback_bias,
                        weights.recurrent, weights.recurrent_bias, gates, kept * 4 * hidden, buffers.inner, classes,
                        hidden, True, SAVE, BLOCK_C, BLOCK, BLOCK_K, False, tile,
                    )  # fmt: skip
                else:
                    gru(
                        buffers.outputs + (step - classes) * hidden, stack * hidden, buffers.state, weights.feedback,
                        weights.feedback_bias, weights.recurrent, weights.recurrent_bias, gates, kept * 4 * hidden,
                        buffers.inner, classes, hidden, False, SAVE, BLOCK_C, BLOCK, BLOCK_K, False, tile,
                    )  # fmt: skip
        elif part == 1:
            wide = tl.cdiv(3 * hidden, BLOCK)
            for number in range(program, wide * rows * count, programs):
                linear(
                    buffers.inner, classes * hidden, weights.qkv, weights.qkv_bias, None, None, 0, qkv,
                    kept * 3 * hidden, classes, hidden, 3 * hidden, False, False, EPS, BLOCK_C, BLOCK, BLOCK_K, False,
                    tile_of(number, wide, rows, count),
                )  # fmt: skip
        elif part == 2:
            queries = tl.cdiv(classes, ATTENTION)
            for number in range(program, queries * sizes.heads * count, programs):
                self_attention(
                    qkv, kept * 3 * hidden, buffers.attended, None, classes, hidden, factor, WIDTH, BLOCK_D, ATTENTION,
                    False, tile_of(number, queries, sizes.heads, count),
                )  # fmt: skip
        elif part == 3:
            for number in range(program, blocks * rows * count, programs):
                linear(
                    buffers.attended, classes * hidden, weights.out, weights.out_bias, buffers.inner, None, 0,
                    pre_norm_1, kept * hidden, classes, hidden, hidden, False, False, EPS, BLOCK_C, BLOCK, BLOCK_K,
                    False, tile_of(number, blocks, rows, count),
                )  # fmt: skip
        elif part == 4:
            for number in range(program, blocks * rows * count, programs):
                linear(
                    pre_norm_1, kept * hidden, weights.y, weights.y_bias, buffers.inner, None, 0, pre_norm_2,
                    kept * hidden, classes, hidden, hidden, True, False, EPS, BLOCK_C, BLOCK, BLOCK_K, False,
                    tile_of(number, blocks, rows, count),
                )  # fmt: skip
        elif part == 5:
            few = tl.cdiv(classes, IMAGES_C)
            for number in range(program, few * sizes.heads * count, programs):
                cross_attention(
                    pre_norm_2, kept * hidden, weights.scale, weights.shift, weights.query, weights.query_bias,
                    buffers.state, scores, kept * width, buffers.mixed, classes, sizes.images, hidden, SAVE, EPS,
                    BLOCK_B, IMAGES_C, BLOCK_K, False, tile_of(number, few, sizes.heads, count),
                )  # fmt: skip
        else:
            for number in range(program, blocks * rows * count, programs):
                linear(
                    buffers.mixed, classes * width, weights.value, None, buffers.state, None, 0,
                    buffers.outputs + step * hidden, stack * hidden, classes, width, hidden, False, True, EPS, BLOCK_C,
                    BLOCK, BLOCK_K, False, tile_of(number, blocks, rows, count),
                )  # fmt: skip
        if phase + 1 < last:
            meet(counter, (phase - first + 1) * programs)


@triton.jit
def backward_kernel(
    weights,  # StepWeights
    saved,  # SavedActivations
    recomputed,  # RecomputedActivations
    gradients,  # StepGradients: `outputs` holds what comes from outside
    buffers,  # BackwardBuffers; `state` is zero
    counter,  # (1,) zero
    first,
    last,
    sizes,  # Sizes
    factor,
    WIDTH: tl.constexpr,  # of a head
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IMAGES_C: tl.constexpr,
    ATTENTION: tl.constexpr,
):
    """Phases of the steps backward: step n − 1 is phases 0 to 6, and phase 6 of step 0 has nothing to do."""
    count, classes, hidden = sizes.decoders, sizes.classes, sizes.hidden
    program, programs = tl.program_id(0), tl.num_programs(0)
    width = sizes.heads * sizes.images
    blocks, rows = tl.cdiv(hidden, BLOCK), tl.cdiv(classes, BLOCK_C)
    tiles = blocks * rows * count
    stack = classes * sizes.steps  # rows of a decoder
    for phase in range(first, last):
        i, part = sizes.steps - 1 - phase // 7, phase % 7
        step = classes * i
        norm = step * count  # statistics are (n,G,C)
        d_outputs = gradients.outputs + step * hidden
        d_h = gradients.h + step * hidden
        d_gates = gradients.gates + step * 4 * hidden
        d_qkv = gradients.qkv + step * 3 * hidden
        d_scores = gradients.scores + step * width
        if part == 0:
            few = tl.cdiv(classes, IMAGES_C)
            for number in range(program, few * sizes.heads * count, programs):
                cross_attention_backward(
                    d_outputs, stack * hidden, weights.value, recomputed.mixed + step * width, stack * width, d_scores,
                    stack * width, classes, sizes.images, hidden, BLOCK_B, IMAGES_C, BLOCK_K, False,
                    tile_of(number, few, sizes.heads, count),
                )  # fmt: skip
        elif part == 1:
            for number in range(program, tiles, programs):
                linear(
                    d_scores, stack * width, weights.query, None, buffers.state, d_outputs, stack * hidden, d_h,
                    stack * hidden, classes, width, hidden, False, True, 0.0, BLOCK_C, BLOCK, BLOCK_K, False,
                    tile_of(number, blocks, rows, count),
                )  # fmt: skip
        elif part == 2:
            for number in range(program, tiles, programs):
                norm_linear_backward(
                    d_h, stack * hidden, weights.scale, saved.pre_norm_2 + step * hidden, stack * hidden,
                    recomputed.mean_2 + norm, recomputed.rstd_2 + norm, weights.y,
                    gradients.pre_norm_2 + step * hidden, stack * hidden, buffers.residual_2, buffers.normed, classes,
                    hidden, BLOCK_C, BLOCK, BLOCK_K, False, tile_of(number, blocks, rows, count),
                )  # fmt: skip
        elif part == 3:
            for number in range(program, tiles, programs):
                norm_linear_backward(
                    buffers.normed, classes * hidden, None, saved.pre_norm_1 + step * hidden, stack * hidden,
                    recomputed.mean_1 + norm, recomputed.rstd_1 + norm, weights.out,
                    gradients.pre_norm_1 + step * hidden, stack * hidden, buffers.residual_1, buffers.attended,
                    classes, hidden, BLOCK_C, BLOCK, BLOCK_K, False, tile_of(number, blocks, rows, count),
                )  # fmt: skip
        elif part == 4:
            both = 2 * tl.cdiv(classes, ATTENTION)
            for number in range(program, both * sizes.heads * count, programs):
                self_attention_backward(
                    saved.qkv + step * 3 * hidden, stack * 3 * hidden, gradients.attended + step * hidden,
                    stack * hidden, buffers.lse + step * sizes.heads, stack * sizes.heads, buffers.attended, d_qkv,
                    stack * 3 * hidden, classes, hidden, factor, WIDTH, BLOCK_D, ATTENTION, False,
                    tile_of(number, both, sizes.heads, count),
                )  # fmt: skip
        elif part == 5:
            for number in range(program, tiles, programs):
                gru_backward(
                    d_qkv, stack * 3 * hidden, weights.qkv, buffers.residual_1, buffers.residual_2,
                    saved.gates + step * 4 * hidden, stack * 4 * hidden, recomputed.h + step * hidden,
                    (stack + classes) * hidden, d_gates, stack * 4 * hidden, buffers.carry, classes, hidden, BLOCK_C,
                    BLOCK, BLOCK_K, False, tile_of(number, blocks, rows, count),
                )  # fmt: skip
        elif i > 0:
            for number in range(program, 2 * tiles, programs):
                recurrence_backward(
                    d_gates, stack * 4 * hidden, weights.recurrent, weights.feedback, buffers.carry, buffers.state,
                    d_outputs - classes * hidden, stack * hidden, classes, hidden, BLOCK_C, BLOCK, BLOCK_K, False,
                    tile_of(number, blocks, rows, 2 * count),
                )  # fmt: skip
        if phase + 1 < last:
            meet(counter, (phase - first + 1) * programs)

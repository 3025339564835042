"""The steps of the GRU prompt decoder as Triton kernels, all decoders in each launch; exact in real arithmetic.

A step is a chain of products that each wait for the one before and have C rows only. Seven launches a step forward and
seven back: everything between two products is part of one of them. LayerNorm is formed while the rows are read, gates,
softmax and their derivatives before they are written. Products take the compute dtype and add up in float32, as all the
rest is computed. Every value is written by one program, so that results do not vary from run to run.

Folding and the gradients of the weights are those of the eager implementation (`folding.py`, `recurrence.py`), and so
are the names. Step i makes of h_{i−1} (state) and summed_{i−1}: gates; inner, what the GRU cell returns; qkv; attended;
pre_norm_1 and pre_norm_2, what the two LayerNorms read; h_i; scores of the images; mixed, their softmax; summed_i.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from ...launch import Batched, can_overlap, configuration, interpreted, launch, multiprocessors, pin
from .. import folding
from ..inputs import Inputs
from ..recurrence import (
    EPS,
    RecomputedActivations,
    SavedActivations,
    StepGradients,
    StepImplementation,
    StepWeights,
    empty_outputs,
    empty_saved,
)
from .backward import (
    cross_attention_backward_kernel,
    gru_backward_kernel,
    norm_linear_backward_kernel,
    recurrence_backward_kernel,
    self_attention_backward_kernel,
)
from .forward import cross_attention_kernel, gru_kernel, linear_kernel, self_attention_kernel
from .persistent import PHASES, BackwardBuffers, ForwardBuffers, Sizes, backward_kernel, forward_kernel

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
# All phases in one kernel: their block sizes are those above.
pin("decoder_steps", sm_80={"num_warps": 4, "num_stages": 3})
pin("decoder_steps_fp32", sm_80={"num_warps": 8, "num_stages": 2})

Choice = Literal["separate", "overlapped", "one"]
"""separate: each kernel after the one before; overlapped: each is set up while the one before ends (programmatic
dependent launch, compute capability 9.0 and newer, elsewhere separate); one: all steps forward are one launch, and all
backward, of programs that wait for one another"""
CHOICE_NAMES: tuple[Choice, ...] = ("separate", "overlapped", "one")
_launches: Choice = "separate"


@contextmanager
def use(launches: Choice) -> Iterator[None]:
    """Within this context the decoder is launched so. No GPU has run any but the first: `use` compares them."""
    global _launches
    before, _launches = _launches, launches
    try:
        yield
    finally:
        _launches = before


INTERPRETED_PROGRAMS = 3
"""programs of a persistent kernel in the interpreter, which runs one after the other"""


def decode(inputs: Inputs) -> Tensor:
    """Outputs o_1…o_n of G decoders, as `op.decode`. They can be differentiated once."""
    return folding.decode(inputs, StepImplementation(forward_steps, backward_steps, folded_only=True))


def forward_steps(weights: StepWeights, n: int, heads: int, save: bool) -> tuple[Tensor, SavedActivations | None]:
    """Outputs (G,n,C,H), and the activations of every step, where they are saved for backward."""
    (count, classes, _), hidden = weights.start.shape, weights.out.shape[-1]
    images = weights.query.shape[1] // heads
    outputs = empty_outputs(weights, n)
    saved = empty_saved(weights, n if save else 1, outputs)
    attended, mixed = (weights.start.new_empty(count, classes, width) for width in (hidden, heads * images))
    inner, state = (weights.scale.new_empty(count, classes, hidden) for _ in range(2))
    sizes = Sizes(count, n, classes, images, hidden, heads)
    if _persists(sizes):
        _in_one_launch(
            forward_kernel,
            sizes,
            *(weights, saved, ForwardBuffers(outputs, inner, state, attended, mixed)),
            SAVE=save,
            EPS=EPS,
        )
        return outputs, saved if save else None
    options = _options("decoder_gru", weights.start)
    images_options = _options("decoder_images", weights.start)
    for i in range(n):
        gates, qkv, pre_norm_1, pre_norm_2, scores = (part[:, i if save else 0] for part in saved[:5])
        launch(
            gru_kernel,
            _grid(options, classes, hidden, count),
            *(Batched(weights.start if i == 0 else outputs[:, i - 1]), state, weights.feedback, weights.feedback_bias),
            *(weights.recurrent, weights.recurrent_bias, Batched(gates), inner, classes, hidden),
            FIRST=i == 0,
            SAVE=save,
            **options,
        )
        _linear(inner, weights.qkv, qkv, bias=weights.qkv_bias)
        _self_attention(qkv, heads, attended)
        _linear(attended, weights.out, pre_norm_1, bias=weights.out_bias, residual=inner)
        _linear(pre_norm_1, weights.y, pre_norm_2, bias=weights.y_bias, residual=inner, normalise=True)
        launch(
            cross_attention_kernel,
            (triton.cdiv(classes, images_options["BLOCK_C"]), heads, count),
            *(Batched(pre_norm_2), weights.scale, weights.shift, weights.query, weights.query_bias, state),
            *(Batched(scores), mixed, classes, images, hidden),
            SAVE=save,
            EPS=EPS,
            BLOCK=_block(images),
            **images_options,
        )
        _linear(mixed, weights.value, outputs[:, i], residual=state, input_first=True)
    return outputs, saved if save else None


def backward_steps(
    weights: StepWeights, saved: SavedActivations, recomputed: RecomputedActivations, gradient: Tensor, heads: int
) -> StepGradients:
    """Go back over the steps, each from the gradients of the one after."""
    (count, n, classes, hidden), dtype = saved.pre_norm_1.shape, saved.qkv.dtype
    images = weights.query.shape[1] // heads
    attended = saved.qkv.new_empty(count, n, classes, hidden)
    lse = weights.scale.new_empty(count, n, heads, classes)
    _self_attention(saved.qkv.flatten(0, 1), heads, attended.flatten(0, 1), lse.flatten(0, 1))

    # From outside; every step adds what it feeds back.
    d_outputs = gradient.clone(memory_format=torch.contiguous_format)
    d_gates, d_qkv, d_pre_norm_1, d_pre_norm_2, d_scores = (torch.empty_like(part, dtype=dtype) for part in saved[:5])
    d_h = torch.empty_like(saved.pre_norm_2)
    d_state = weights.scale.new_zeros(count, classes, hidden)
    d_normed, residual_1, residual_2, carry = (torch.empty_like(d_state) for _ in range(4))
    d_attended = attended.new_empty(count, classes, hidden)
    gradients = StepGradients(
        outputs=d_outputs,
        gates=d_gates,
        qkv=d_qkv,
        pre_norm_1=d_pre_norm_1,
        pre_norm_2=d_pre_norm_2,
        scores=d_scores,
        summed=d_outputs,
        h=d_h,
        keys=None,
        values=None,
        attended=attended,
    )
    sizes = Sizes(count, n, classes, images, hidden, heads)
    if _persists(sizes):
        _in_one_launch(
            backward_kernel,
            sizes,
            *(weights, saved, recomputed, gradients),
            BackwardBuffers(d_state, d_normed, residual_1, residual_2, carry, d_attended, lse),
        )
        return gradients
    options = _options("decoder_linear", weights.start)
    images_options = _options("decoder_images", weights.start)
    attention_options = _attention_options(weights.start, hidden // heads)
    grid = _grid(options, classes, hidden, count)
    for i in reversed(range(n)):
        launch(
            cross_attention_backward_kernel,
            (triton.cdiv(classes, images_options["BLOCK_C"]), heads, count),
            *(Batched(d_outputs[:, i]), weights.value, Batched(recomputed.mixed[:, i]), Batched(d_scores[:, i])),
            *(classes, images, hidden),
            BLOCK=_block(images),
            **images_options,
        )
        _linear(d_scores[:, i], weights.query, d_h[:, i], residual=d_state, other=d_outputs[:, i], input_first=True)
        launch(
            norm_linear_backward_kernel,
            grid,
            *(Batched(d_h[:, i]), weights.scale, Batched(saved.pre_norm_2[:, i])),
            *(recomputed.mean_2[i], recomputed.rstd_2[i], weights.y),
            *(Batched(d_pre_norm_2[:, i]), residual_2, d_normed, classes, hidden),
            **options,
        )
        launch(
            norm_linear_backward_kernel,
            grid,
            *(Batched(d_normed), None, Batched(saved.pre_norm_1[:, i])),
            *(recomputed.mean_1[i], recomputed.rstd_1[i], weights.out),
            *(Batched(d_pre_norm_1[:, i]), residual_1, d_attended, classes, hidden),
            **options,
        )
        launch(
            self_attention_backward_kernel,
            (2 * triton.cdiv(classes, attention_options["BLOCK"]), heads, count),
            *(Batched(saved.qkv[:, i]), Batched(attended[:, i]), Batched(lse[:, i]), d_attended),
            *(Batched(d_qkv[:, i]), classes, hidden, (hidden // heads) ** -0.5),
            WIDTH=hidden // heads,
            BLOCK_D=_block(hidden // heads),
            **attention_options,
        )
        launch(
            gru_backward_kernel,
            grid,
            *(Batched(d_qkv[:, i]), weights.qkv, residual_1, residual_2, Batched(saved.gates[:, i])),
            *(Batched(recomputed.h[:, i]), Batched(d_gates[:, i]), carry, classes, hidden),
            **options,
        )
        if i > 0:
            launch(
                recurrence_backward_kernel,
                _grid(options, classes, hidden, 2 * count),
                *(Batched(d_gates[:, i]), weights.recurrent, weights.feedback, carry, d_state),
                *(Batched(d_outputs[:, i - 1]), classes, hidden),
                **options,
            )
    return gradients


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
    (count, classes, inputs), outputs = x.shape, output.shape[-1]
    options = _options("decoder_linear", weight)
    launch(
        linear_kernel,
        _grid(options, classes, outputs, count),
        *(Batched(x), weight, bias, residual, Batched(other), Batched(output), classes, inputs, outputs),
        NORMALISE=normalise,
        INPUT_FIRST=input_first,
        EPS=EPS,
        **options,
    )


def _self_attention(qkv: Tensor, heads: int, attended: Tensor, lse: Tensor | None = None) -> None:
    """Self-attention of (A,C,3H) into (A,C,H), and its log-sum-exp (A,heads,C)."""
    count, classes, hidden = attended.shape
    options = _attention_options(qkv, hidden // heads)
    launch(
        self_attention_kernel,
        (triton.cdiv(classes, options["BLOCK"]), heads, count),
        *(Batched(qkv), attended, lse, classes, hidden, (hidden // heads) ** -0.5),
        WIDTH=hidden // heads,
        BLOCK_D=_block(hidden // heads),
        **options,
    )


def _persists(sizes: Sizes) -> bool:
    """Tell if all steps are one launch, whose offsets within a decoder are 32-bit."""
    widest = max(4 * sizes.hidden, sizes.heads * sizes.images)
    return _launches == "one" and (sizes.steps + 1) * sizes.classes * widest < 2**31


def _in_one_launch(kernel: Any, sizes: Sizes, *arguments: Any, **constants: Any) -> None:
    """Launch a persistent kernel with a program a multiprocessor; in the interpreter launch each of its phases."""
    like: Tensor = arguments[0].start
    width = sizes.hidden // sizes.heads
    blocks = _options("decoder_linear", like)
    options = configuration("decoder_steps_fp32" if like.dtype == torch.float32 else "decoder_steps", like.device)
    if width > 64:
        options["num_warps"] = 8
    together = not interpreted(like.device)
    phases = PHASES * sizes.steps
    counter = torch.zeros(1, dtype=torch.int32, device=like.device)
    for first, last in [(0, phases)] if together else zip(range(phases), range(1, phases + 1), strict=True):
        launch(
            kernel,
            (multiprocessors(like.device) if together else INTERPRETED_PROGRAMS,),
            *(*arguments, counter, first, last, sizes, width**-0.5),
            **constants,
            WIDTH=width,
            BLOCK_D=_block(width),
            BLOCK_B=_block(sizes.images),
            **{name: blocks[name] for name in ("BLOCK_C", "BLOCK", "BLOCK_K")},
            IMAGES_C=_options("decoder_images", like)["BLOCK_C"],
            ATTENTION=_options("decoder_attention", like)["BLOCK"],
            launch_cooperative_grid=True,  # all programs run at once, or the launch fails
            **options,
        )


def _options(kernel: str, like: Tensor) -> dict[str, int]:
    """Configuration of a kernel for the dtype and device of a tensor, and whether it overlaps the one before."""
    overlap = _launches == "overlapped" and can_overlap(like.device)
    options = configuration(f"{kernel}_fp32" if like.dtype == torch.float32 else kernel, like.device)
    return {**options, "OVERLAP": overlap, **({"launch_pdl": True} if overlap else {})}


def _attention_options(qkv: Tensor, width: int) -> dict[str, int]:
    options = _options("decoder_attention", qkv)
    return {**options, "num_warps": 8} if width > 64 else options  # for the registers


def _grid(options: dict[str, int], classes: int, columns: int, count: int) -> tuple[int, int, int]:
    """Programs for blocks of `columns`, for blocks of rows, for decoders."""
    return triton.cdiv(columns, options["BLOCK"]), triton.cdiv(classes, options["BLOCK_C"]), count


def _block(size: int) -> int:
    """Power of two that holds `size`, at least 16 for the tensor cores."""
    return max(16, triton.next_power_of_2(size))
